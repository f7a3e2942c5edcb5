"""A graph traced in fp32 -> one whose every value has the dtype that it is computed in.

TensorRT runs what the graph says: both operands of a sum have one dtype, and no node widens on its
own. So each node gets its dtype here, in the order of the graph, and a Cast where an operand has
another:

    products            the dtype of their weight (a router's is fp32), else half
    sums of squares,    fp32: what adds up many numbers, or reaches far
    exp, softmax ...
    Concat              half if a part is: it feeds a product or the cache
    what moves values   the dtype of the first operand
    codes               int8 of numbers in half, and half of int8, where scales are
    all others          fp32 if an operand is, else half; constants and vectors follow

A Cast to fp32 that a rule wrote stays: that is how a rule asks for fp32.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir

from mla_deploy.errors import MlaDeployError
from mla_deploy.rewrite.mla_decode_body import OPERATOR
from mla_deploy.rewrite.rule import DOMAIN

FLOAT, BOOL, INT64 = ir.DataType.FLOAT, ir.DataType.BOOL, ir.DataType.INT64
LAYER = "DecoderLayer"  # the trunk's node for a layer
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_FLOATS = (FLOAT, *_HALVES)

_PRODUCTS = {"MatMul", "Gemm", "Einsum", "Attention", "TRT_Attention"}
_WIDE = {
    "CumSum", "Cos", "Exp", "Log", "Pow", "Reciprocal", "ReduceL2", "ReduceLogSumExp", "ReduceMean",
    "ReduceSum", "ReduceSumSquare", "Scan", "Sin", "Softmax", "Softplus", "Sqrt",
}  # fmt: skip
_FIRST = {
    "Gather", "GatherElements", "GatherND", "Pad", "RMSNormalization", "ScatterElements",
    "ScatterND", "TensorScatter",
}  # fmt: skip
_MOVES = {"Expand", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
_TRUTHS = {
    "And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or", "Xor",
}  # fmt: skip
_INTEGERS = {"NonZero", "Shape", "Size"}


def assign_types(
    graph: ir.Graph,
    half: ir.DataType,
    weights: Collection[ir.Value],
    outputs: Mapping[ir.Value, ir.DataType],
) -> None:
    """Type every value of `graph` and insert the casts that follow, in place.

    Inputs and initializers have their dtypes already. `weights` are those of them that are weights;
    `outputs` gives the dtypes that graph outputs must have. `half` may be fp32.
    Raises: MlaDeployError REW-TYPE for a value whose dtype cannot be told.
    """
    typing = _Typing(graph, half, weights)
    for node in list(graph):
        typing.node(node)
    for place, value in enumerate(graph.outputs):
        wanted = outputs.get(value)
        if wanted is not None and value.dtype != wanted:
            graph.outputs[place] = typing.cast(value, wanted, None)
    _drop_idle_casts(graph)


class _Typing:
    def __init__(self, graph: ir.Graph, half: ir.DataType, weights: Collection[ir.Value]) -> None:
        self.graph = graph
        self.half = half
        self.weights = set(weights)
        # What follows the dtype of the values it meets: constants, and vectors among the weights.
        self.followers = {w for w in self.weights if len(w.shape or ()) < 2}
        self.made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        # Arguments that one layer hands to the next: of one dtype, whoever makes the first.
        self.handed = {
            place
            for node in graph
            if node.op_type == LAYER
            for place, value in enumerate(node.inputs)
            if value is not None and _is_layer(value.producer())
        }

    def node(self, node: ir.Node) -> None:
        floats = [v for v in node.inputs if v is not None and _known(v) in _FLOATS]
        if node.op_type == "Constant" and node.domain == "":
            self._constant(node)
        elif node.op_type == "ConstantOfShape":
            self._give(node, node.attributes["value"].as_tensor().dtype)
            self.followers.add(node.outputs[0])
        elif node.op_type == "Cast":
            self._give(node, ir.DataType(node.attributes["to"].as_int()))
        elif node.op_type == "DequantizeLinear":
            self._give(node, floats[0].dtype or self.half)
        elif node.op_type == "QuantizeLinear":
            self._codes(node)
        elif node.domain == DOMAIN and node.op_type == OPERATOR:
            self._operator(node)
        elif node.domain == DOMAIN:
            self._layer(node)
        elif not floats:
            self._give(node, _plain(node))
        else:
            wanted = self._dtype(node, floats)
            for place, value in enumerate(node.inputs):
                if value in floats and value is not None and value.dtype != wanted:
                    node.replace_input_with(place, self.cast(value, wanted, node))
            self._give(node, wanted)
        if node.op_type in _MOVES and floats:
            for kind in (self.followers, self.weights):
                if floats[0] in kind:
                    kind.update(node.outputs)

    def cast(self, value: ir.Value, to: ir.DataType, before: ir.Node | None) -> ir.Value:
        """`value` as `to`: a constant is converted here, anything else by a node."""
        known = self.made.get((value, to))
        if known is not None:
            return known
        tensor = value.const_value if value.producer() is not None else None
        if tensor is not None and tensor.size < 64:
            node = ir.node("Constant", [], attributes={"value": _converted(tensor, to)})
            node.outputs[0].const_value = node.attributes["value"].as_tensor()
        else:
            node = ir.node("Cast", [value], attributes={"to": to})
        node.outputs[0].type = ir.TensorType(to)
        node.outputs[0].shape = value.shape
        if value.producer() is not None:
            self.graph.insert_after(_required(value.producer()), node)
        elif before is not None:
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.append(node)
        self.made[value, to] = node.outputs[0]
        return node.outputs[0]

    def _dtype(self, node: ir.Node, floats: list[ir.Value]) -> ir.DataType:
        held = [v for v in floats if v not in self.followers] or floats
        if node.op_type in _PRODUCTS:
            weights = [v for v in floats if v in self.weights and v not in self.followers]
            return _known(weights[0]) if weights else self.half
        if node.op_type in _WIDE:
            return FLOAT
        if node.op_type in _FIRST or node.op_type in _MOVES:
            first = floats[0]
            return _known(first) if first not in self.followers else _widest(held)
        if node.op_type == "Concat" and any(v.dtype in _HALVES for v in held):
            return self.half
        return _widest(held)

    def _constant(self, node: ir.Node) -> None:
        tensor = ir.convenience.get_const_tensor(node.outputs[0])
        if tensor is None:
            raise MlaDeployError("REW-TYPE", f"the constant {node.outputs[0].name} has no value")
        node.outputs[0].const_value = tensor
        self._give(node, tensor.dtype)
        self.followers.add(node.outputs[0])

    def _codes(self, node: ir.Node) -> None:
        """Numbers in the dtype of their scales become what the zero point is."""
        values, scale, zero = (_required_value(value) for value in node.inputs)
        if values.dtype != scale.dtype:
            node.replace_input_with(0, self.cast(values, _known(scale), node))
        self._give(node, _known(zero))

    def _operator(self, node: ir.Node) -> None:
        """MlaDecode: query and new rows as the cache is stored, and so are its results."""
        cache = node.inputs[2]
        dtype = self.half if cache is None else _known(cache)
        for place, value in enumerate(node.inputs[:2]):
            if value is not None and value.dtype != dtype:
                node.replace_input_with(place, self.cast(value, dtype, node))
        for value in node.outputs:
            value.type = ir.TensorType(dtype)

    def _layer(self, node: ir.Node) -> None:
        """What a decoder layer takes and gives: hidden states in half, positions as they are."""
        for place in sorted(self.handed):
            value = node.inputs[place]
            if value is not None and value.dtype == FLOAT:
                node.replace_input_with(place, self.cast(value, self.half, node))
        for value in node.outputs:
            if value.dtype == FLOAT:
                value.type = ir.TensorType(self.half)

    def _give(self, node: ir.Node, dtype: ir.DataType) -> None:
        """The node's dtype to its outputs, but for truths, counts and places."""
        for place, value in enumerate(node.outputs):
            if node.op_type in _TRUTHS:
                value.type = ir.TensorType(BOOL)
            elif node.op_type in _INTEGERS or (node.op_type == "TopK" and place == 1):
                value.type = ir.TensorType(INT64)
            else:
                value.type = ir.TensorType(dtype)


def _is_layer(node: ir.Node | None) -> bool:
    return node is not None and node.domain == DOMAIN and node.op_type == LAYER


def _plain(node: ir.Node) -> ir.DataType:
    """The dtype of a node that reads no floats: that of the values it takes from."""
    if node.op_type in (*_TRUTHS, *_INTEGERS):
        return INT64
    values = [v for v in node.inputs if v is not None]
    first = values[1] if node.op_type == "Where" else values[0]
    return _known(first)


def _widest(values: list[ir.Value]) -> ir.DataType:
    found = [_known(value) for value in values]
    return FLOAT if FLOAT in found else found[0]


def _known(value: ir.Value) -> ir.DataType:
    if value.dtype is None:
        raise MlaDeployError("REW-TYPE", f"the dtype of {value.name} is not known")
    return value.dtype


def _required_value(value: ir.Value | None) -> ir.Value:
    if value is None:
        raise MlaDeployError("REW-TYPE", "codes without a scale and a zero point")
    return value


def _required(node: ir.Node | None) -> ir.Node:
    if node is None:
        raise MlaDeployError("REW-TYPE", "a value has no producer")
    return node


def _converted(tensor: ir.TensorProtocol, to: ir.DataType) -> ir.TensorProtocol:
    return ir.Tensor(np.asarray(tensor.numpy()).astype(to.numpy()), dtype=to)


def _drop_idle_casts(graph: ir.Graph) -> None:
    """Casts from a dtype to itself: what rules ask for in fp32 when all of the graph is."""
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "Cast" else None
        if source is None or source.dtype != node.outputs[0].dtype:
            continue
        if node.outputs[0] in graph.outputs:
            continue
        node.outputs[0].replace_all_uses_with(source)
        graph.remove(node, safe=True)
