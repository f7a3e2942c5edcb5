"""Quantised weights of a TensorRT graph: DequantizeLinear at its top, one for each weight.

    # before:  layer.3(hidden, ..., weight)
    # after:   wide = DequantizeLinear(values, scales; axis, block_size)
    #          layer.3(hidden, ..., wide)

Not inside the layers' functions: two calls of one would give a network two such nodes of one name,
which TensorRT refuses. Numbers are signed, without zero points, scales in the dtype of the graph.
What would have to be widened whole at every step stays in half: an embedding, of which a few rows
are taken, and stacks of experts, of which a few are chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import onnx_ir as ir

from mla_deploy.export.assemble import GraphForm
from mla_deploy.export.weights import stored_name
from mla_deploy.rewrite.quantized_weight import DTYPES
from mla_deploy.rewrite.weights import HALVES, WeightUse
from mla_deploy.weight_forms.form import PER_CHANNEL, WeightForm
from mla_deploy.weight_forms.parts import QDQ, QDQ_HEADS, Part, part_names
from mla_deploy.weight_forms.roles import role_of

_MATRIX_RANK, _HALF_RANK = 2, 3


class DequantizedWeights:
    """Makes the values that layers are called with; `initializer` gives those of stored tensors.

    `left`: parameters that stay in half. `role`: of all weights, None takes it from their names.
    """

    def __init__(
        self, form: GraphForm, initializer: Callable[[WeightUse, tuple[int, ...]], ir.Value]
    ) -> None:
        self.left: set[str] = set()
        self.role: str | None = None
        self._form = form
        self._initializer = initializer
        self._wide: dict[str, ir.Value] = {}

    def value(self, use: WeightUse, shape: tuple[int, ...], graph: ir.Graph) -> ir.Value:
        """The weight, in the dtype of the graph."""
        form = self._form_of(use, shape)
        if form is None:
            return self._initializer(use, shape)
        name = stored_name(use)
        if name not in self._wide:
            self._wide[name] = self._added(use, shape, form, graph)
        return self._wide[name]

    def _added(
        self, use: WeightUse, shape: tuple[int, ...], form: WeightForm, graph: ir.Graph
    ) -> ir.Value:
        dtype, layout = self._form.dtype, QDQ_HEADS if use.half == HALVES[0] else QDQ
        parts = [Part(name, form, layout, dtype) for name in part_names(form)]
        stored = [self._initializer(replace(use, part=p), p.shape(shape)) for p in parts]
        axis = _axis(use)
        attributes = {"axis": axis, "block_size": form.block}
        if form.block == PER_CHANNEL:
            attributes = {"axis": 0}  # one scale for each row, with no axis of blocks
        node = ir.node("DequantizeLinear", stored, attributes=attributes)
        node.name = f"dequantize.{stored_name(use)}"
        wide = node.outputs[0]
        wide.name = f"{stored_name(use)}.wide"
        wide.type, wide.shape = ir.TensorType(DTYPES[dtype]), ir.Shape(shape)
        graph.insert_before(graph[0], node)
        return wide

    def _form_of(self, use: WeightUse, shape: tuple[int, ...]) -> WeightForm | None:
        """None: the weight stays in half."""
        plan, router_rows = self._form.plan, self._form.config.router_rows
        if plan is None or use.parameter in self.left:
            return None
        if len(shape) != (_MATRIX_RANK if use.half is None else _HALF_RANK):
            return None
        if use.half is None and shape[0] == router_rows:
            return None
        role = self.role or ("kv_b" if use.half else role_of(use.parameter))
        form = plan.form(role)
        columns = shape[_axis(use)]
        return None if form is None or columns % form.width(columns) else form


def _axis(use: WeightUse) -> int:
    """That of the blocks. Prefill turns w_uv_HLV to [L, H, V] and w_uk_HNL to [L, H, N], and
    TensorRT-RTX 1.7 compiles blocks along the last two axes of what it multiplies only."""
    return 2 if use.half == HALVES[1] else 1
