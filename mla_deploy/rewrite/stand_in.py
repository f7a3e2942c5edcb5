"""A graph of a TensorRT bundle as one that ONNX Runtime's CPU provider runs.

The same nodes in the same order. TensorRT's own attention operator is written out; a value of half
precision is computed in fp32 and rounded to it, so that a CPU without half-precision kernels says
what strong types say:

    # before:  y = MatMul(x, w)                        all fp16
    # after:   y = Cast(Cast(MatMul(x, w), fp16), fp32)      all fp32, y rounded

What moves a cache keeps its dtype, since the cache is bound to the graph as it is stored.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common as common_passes

from mla_deploy import shapes

_FLOAT = ir.DataType.FLOAT
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_MASKED = -3.4028234663852886e38
# They hand on what a cache or a weight holds; nothing is computed.
_CACHE_WRITES = {"ScatterND", "TensorScatter"}
_TRUTHS = {"And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or"}


def stand_in(model: ir.Model) -> None:
    """Make `model`, a graph of a TensorRT bundle, one that a CPU runs; in place."""
    common_passes.InlinePass()(model)
    _any_capacity(model.graph)
    _write_out_attention(model.graph)
    _Rounded(model.graph).all()


def _any_capacity(graph: ir.Graph) -> None:
    """Rows of the cache as many as are bound: a case needs few of the engine's."""
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None and len(value.shape) == 4:
            value.shape = ir.Shape([*value.shape[:2], shapes.CAPACITY, value.shape[3]])


def _write_out_attention(graph: ir.Graph) -> None:
    """trt::TRT_Attention(query, key, value, mask): no scale, a mask of truths."""
    for node in list(graph):
        node.attributes.pop("TRT_decomposable", None)
        if node.op_type != "TRT_Attention":
            continue
        query, key, value, mask = node.inputs
        made: list[ir.Node] = []

        def add(op_type: str, *inputs: Any, made: list[ir.Node] = made, **kw: Any) -> ir.Value:
            made.append(ir.node(op_type, inputs, attributes=kw or None))
            return made[-1].outputs[0]

        scores = add("MatMul", query, add("Transpose", key, perm=[0, 1, 3, 2]))
        wide = add("Cast", scores, to=_FLOAT)
        shares = add(
            "Softmax", add("Where", mask, wide, add("Constant", value_float=_MASKED)), axis=-1
        )
        out = add("MatMul", add("CastLike", shares, value), value)
        for place, new in enumerate(made):
            new.name = f"{node.name}_{place}"
        graph.insert_before(node, made)
        node.outputs[0].replace_all_uses_with(out)
        graph.remove(node, safe=True)


class _Rounded:
    """Computes in fp32 and rounds what was half. Tracks the dtype that each value has in truth."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.truth: dict[ir.Value, ir.DataType | None] = {}
        self.wide: dict[ir.Value, ir.Value] = {}  # half values as fp32

    def all(self) -> None:
        graph = self.graph
        for value in (*graph.inputs, *graph.initializers.values()):
            self.truth[value] = value.dtype
        for node in list(graph):
            self._node(node)
        for node in graph:
            for value in node.outputs:
                if not value.is_graph_output():
                    value.type = value.shape = None  # half precision that is fp32 now

    def _node(self, node: ir.Node) -> None:
        inputs = [v for v in node.inputs if v is not None]
        truth = self._truth(node, inputs)
        for value in node.outputs:
            self.truth[value] = truth
        if node.op_type == "TopK":
            self.truth[node.outputs[1]] = ir.DataType.INT64
        if node.op_type in _CACHE_WRITES and self._is_cache(inputs[0]):
            if truth in _HALVES:
                update = 1 if node.op_type == "TensorScatter" else 2
                narrow = self._added(node, "Cast", inputs[update], to=truth)
                node.replace_input_with(update, narrow)
            return
        if not any(self.truth.get(v) in _HALVES for v in (*inputs, *node.outputs)):
            return
        for place, operand in enumerate(node.inputs):
            if operand is not None and self.truth.get(operand) in _HALVES:
                node.replace_input_with(place, self._widened(operand, node))
        if truth in _HALVES:
            self._round(node, truth)

    def _round(self, node: ir.Node, truth: ir.DataType) -> None:
        if node.op_type == "Constant":
            tensor = node.attributes["value"].as_tensor().numpy().astype("float32")
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(tensor))
            self.wide[node.outputs[0]] = node.outputs[0]
            return
        if node.op_type == "Cast":
            node.attributes["to"] = ir.AttrInt64("to", _FLOAT)
        for value in node.outputs:
            if self.truth[value] != truth:
                continue  # places, not numbers
            narrow = ir.node("Cast", [value], attributes={"to": truth})
            again = ir.node("Cast", narrow.outputs, attributes={"to": _FLOAT})
            value.replace_all_uses_with(again.outputs[0])
            narrow.replace_input_with(0, value)
            self.graph.insert_after(node, [narrow, again])
            self.truth[again.outputs[0]] = truth
            self.wide[again.outputs[0]] = again.outputs[0]

    def _widened(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        if value not in self.wide:
            self.wide[value] = self._added(reader, "Cast", value, to=_FLOAT)
        return self.wide[value]

    def _added(self, before: ir.Node, op_type: str, *inputs: ir.Value, **attributes: Any) -> Any:
        node = ir.node(op_type, inputs, attributes=attributes)
        self.graph.insert_before(before, node)
        self.truth[node.outputs[0]] = attributes["to"]
        return node.outputs[0]

    def _truth(self, node: ir.Node, inputs: list[ir.Value]) -> ir.DataType | None:
        """What strong types say: one dtype for all floats of a node."""
        if node.op_type == "Cast":
            return ir.DataType(node.attributes["to"].as_int())
        if node.op_type == "Constant":
            tensor = ir.convenience.get_const_tensor(node.outputs[0])
            return None if tensor is None else tensor.dtype
        if node.op_type in _TRUTHS:
            return ir.DataType.BOOL
        if node.op_type == "QuantizeLinear":
            return ir.DataType.INT8
        floats = [self.truth[v] for v in inputs if self.truth.get(v) in (_FLOAT, *_HALVES)]
        return floats[0] if floats and node.op_type != "Shape" else None

    def _is_cache(self, value: ir.Value) -> bool:
        return value.is_graph_input()
