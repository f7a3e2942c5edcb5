"""A graph that makes a quantised weight float again, as prefill does with w_uk."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mla_deploy.rewrite.quantize_heads import widened
from mla_deploy.rewrite.rule import Body
from mla_deploy.weight_forms.form import WeightForm
from mla_deploy.weight_forms.parts import part_names


def widened_model(form: WeightForm, columns: int, shapes: dict[str, tuple[int, ...]]) -> bytes:
    """parts -> weight, as a serialised model."""
    inputs = []
    for name in part_names(form):
        dtype = ir.DataType.FLOAT if name == "scales" else ir.DataType.UINT8
        inputs.append(ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shapes[name])))
    body: Any = Body("wide")
    out = widened(body, inputs, form, columns)
    out.type = ir.TensorType(ir.DataType.FLOAT)
    made = body.graph(out)
    nodes = list(made)
    made.outputs.clear()
    made.remove(nodes)
    graph = ir.Graph(inputs, [out], nodes=nodes, opset_imports={"": 23}, name="wide")
    return bytes(ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString())
