"""A foreign graph in the operators and dtypes of ours: opset 18 and later, fp32 arithmetic.

Operators changed little since opset 13: reductions take their axes as an input, Split says how many
parts it makes. Halves become fp32: weights are widened when they are read, as in every bundle.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mla_deploy.foreign.graph import ForeignGraph
from mla_deploy.foreign.nodes import Nodes

_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_REDUCTIONS = {
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceProd", "ReduceSumSquare",
}  # fmt: skip


def modernise(graph: ir.Graph, nodes: Nodes) -> None:
    """In place, nodes of branches and loop bodies too."""
    for node in list(ir.traversal.RecursiveGraphIterator(graph)):
        if node.domain == "" and node.op_type in _REDUCTIONS and "axes" in node.attributes:
            axes = nodes.constant(np.array(node.attributes["axes"].value, dtype=np.int64))
            del node.attributes["axes"]
            node.resize_inputs(2)
            node.replace_input_with(1, axes)
        if node.domain == "" and node.op_type == "Split" and len(node.inputs) < 2:
            node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))
        _widen(node)


def free_rows(graph: ForeignGraph, nodes: Nodes) -> None:
    """A graph of one row for any number: shapes that say 1 where rows are copy what is there."""
    for node in graph.model.graph:
        if node.op_type not in ("Reshape", "Expand") or node.domain != "":
            continue
        source, shape = node.inputs[:2]
        dims = graph.known.values.get(shape) if shape is not None else None
        axes = graph.axes(source) if source is not None else None
        if dims is None or not axes or axes[0] != "B" or not dims.size or dims[0] != 1:
            continue
        if not graph.depends(node.outputs[0]):
            continue
        if shape is not None and shape.const_value is not None and 0 not in dims:
            first = 0 if node.op_type == "Reshape" else 1
            copied = nodes.constant(np.array([first, *dims[1:]], dtype=np.int64))
            node.replace_input_with(1, copied)
            node.attributes.pop("allowzero", None)


def _widen(node: ir.Node) -> None:
    for name, attribute in list(node.attributes.items()):
        is_dtype = name in ("to", "dtype") and attribute.type == ir.AttributeType.INT
        if is_dtype and attribute.value in _HALVES:
            node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in _HALVES:
            wide = ir.tensor(attribute.as_tensor().numpy().astype(np.float32))
            node.attributes[name] = ir.AttrTensor(name, wide)
    for value in node.outputs:
        if value.dtype in _HALVES:
            value.type = ir.TensorType(ir.DataType.FLOAT)
        if value.const_value is not None and value.const_value.dtype in _HALVES:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32))
