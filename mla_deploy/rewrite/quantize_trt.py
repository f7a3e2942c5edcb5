"""quantise: weights of a TensorRT graph -> the same, stored in few bits before DequantizeLinear.

    # before:  Transpose(weight_NK) --> MatMul
    # after:   QuantizeWeight(weight) -> values, scales
    #          DequantizeLinear(values, scales; axis, block_size) --> Transpose --> MatMul

TensorRT takes signed numbers without zero points, and folds the operator into the product. What it
would have to widen whole at every step stays in half: an embedding, of which a few rows are taken,
and stacks of experts, of which a few are chosen.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mla_deploy.rewrite.quantized_weight import OPERATOR, part_values
from mla_deploy.rewrite.rule import DOMAIN, required
from mla_deploy.rewrite.weights import free_values
from mla_deploy.weight_forms.form import PER_CHANNEL, WeightForm, WeightPlan
from mla_deploy.weight_forms.parts import QDQ, QDQ_HEADS
from mla_deploy.weight_forms.roles import role_of

ROLES = ("linear", "kv_b", "head")
_HALVES_RANK, _MATRIX_RANK = 3, 2


class DequantizeWeights:
    """A pass over a graph whose rules have run; `dtype` is that of scales: the graph's half."""

    def __init__(self, plan: WeightPlan, router_rows: int, dtype: str) -> None:
        self.plan = plan
        self.router_rows = router_rows
        self.dtype = dtype

    def __call__(self, model: ir.Model, role: str | None = None) -> int:
        """Rewrite in place; the number of weights. `role` None takes it from a weight's name."""
        graph = model.graph
        halves = [
            output
            for node in graph
            if node.op_type == "SplitHeads" and node.domain == DOMAIN
            for output in _typed_halves(node)
        ]
        weights = [*(v for v in graph.inputs if not v.is_initializer()), *free_values(graph)]
        count = 0
        for value in (*weights, *halves):
            form = self._form(value, role)
            if form is not None:
                self._insert(graph, value, form)
                count += 1
        return count

    def _form(self, value: ir.Value, role: str | None) -> WeightForm | None:
        """None: it is no weight, or stays as it is."""
        shape = tuple(size for size in value.shape or () if isinstance(size, int))
        is_half = value.producer() is not None
        rank = _HALVES_RANK if is_half else _MATRIX_RANK
        if value.shape is None or len(shape) != len(value.shape) or len(shape) != rank:
            return None
        if value.dtype != ir.DataType.FLOAT or not value.uses():
            return None
        if not is_half and (shape[0] == self.router_rows or _is_gathered(value)):
            return None
        kind = "kv_b" if is_half else role or role_of(str(value.name))
        form = self.plan.form(kind) if kind in ROLES else None
        summed = shape[1]
        if form is None or (form.block != PER_CHANNEL and summed % form.block):
            return None
        return form

    def _insert(self, graph: ir.Graph, weight: ir.Value, form: WeightForm) -> None:
        is_half = weight.producer() is not None
        layout = QDQ_HEADS if is_half else QDQ
        readers = list(weight.uses())
        node = ir.node(
            OPERATOR,
            [weight],
            domain=DOMAIN,
            attributes={
                "kind": form.kind, "block": form.block, "symmetric": 1, "layout": layout,
                "scale_dtype": self.dtype,
            },
            num_outputs=2,
        )  # fmt: skip
        part_values(node, form, layout, self.dtype)
        attributes: dict[str, Any] = {"axis": 1, "block_size": form.block}
        if form.block == PER_CHANNEL:
            attributes = {"axis": 0}
        wide = ir.node("DequantizeLinear", node.outputs, attributes=attributes)
        wide.outputs[0].name = f"{weight.name}.wide"
        wide.outputs[0].shape, wide.outputs[0].type = weight.shape, weight.type
        for reader, place in readers:
            reader.replace_input_with(place, wide.outputs[0])
        maker = weight.producer()
        if maker is None:
            graph.insert_before(graph[0], [node, wide])
        else:
            graph.insert_after(maker, [node, wide])


def _typed_halves(node: ir.Node) -> list[ir.Value]:
    """w_uk_HNL and w_uv_HLV, whose shapes the composite tells."""
    heads, nope, value = (int(node.attributes[name].value) for name in ("heads", "nope", "value"))
    source = required(node.inputs[0])
    rank = source.shape[1] if source.shape is not None else 0
    shapes = ((heads, nope, rank), (heads, rank, value))
    names = ("w_uk_HNL", "w_uv_HLV")
    for output, shape, name in zip(node.outputs, shapes, names, strict=True):
        output.shape, output.type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
        output.name = output.name or f"{source.name}.{name}"
    return list(node.outputs)


def _is_gathered(weight: ir.Value) -> bool:
    return any(node.op_type == "Gather" for node, _ in weight.uses())
