"""ONNX Runtime's own operators as plain ones of the same shapes, for ONNX's shape inference.

It knows nothing of `com.microsoft`, so behind a product with a quantised weight every shape would
be unknown. The values are of no interest there: the weight becomes an input of the right size.
"""

from __future__ import annotations

import onnx

_FLOAT = onnx.TensorProto.FLOAT


def plain_products(graph: onnx.GraphProto) -> None:
    """MatMulNBits and MatMulIntegerToFloat -> MatMul, GatherBlockQuantized -> Gather, in `graph`
    and its branches."""
    sizes = {value.name: _dims(value) for value in graph.input}
    _rename(graph, graph, sizes)


def _rename(graph: onnx.GraphProto, top: onnx.GraphProto, sizes: dict[str, list[int]]) -> None:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g, top, sizes)
        numbers = {a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT}
        if node.op_type == "MatMulNBits":
            operands = [node.input[0], _weight(top, node, [numbers["K"], numbers["N"]])]
            _replace(node, "MatMul", operands)
        elif node.op_type == "MatMulIntegerToFloat":
            _replace(node, "MatMul", list(node.input[:2]))
        elif node.op_type == "GatherBlockQuantized":
            rows, packed = sizes[node.input[0]]
            columns = packed * 8 // numbers["bits"]
            _replace(node, "Gather", [_weight(top, node, [rows, columns]), node.input[1]])


def _weight(top: onnx.GraphProto, node: onnx.NodeProto, shape: list[int]) -> str:
    name = f"{node.output[0]}.weight"
    kind = top.input.add(name=name).type.tensor_type
    kind.elem_type = _FLOAT
    for size in shape:
        kind.shape.dim.add(dim_value=size)
    return name


def _replace(node: onnx.NodeProto, op_type: str, operands: list[str]) -> None:
    node.op_type, node.domain = op_type, ""
    del node.attribute[:], node.input[:]
    node.input.extend(operands)


def _dims(value: onnx.ValueInfoProto) -> list[int]:
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]
