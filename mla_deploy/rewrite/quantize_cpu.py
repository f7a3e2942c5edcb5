"""quantise: products with a weight -> ONNX Runtime's products with a weight of four or eight bits.

    # before:  x_XK --Gemm(weight_NK, transB=1)--> [+ bias]
    # after:   QuantizeWeight(weight) -> values, scales [, zero points]
    #          x_XK --MatMulNBits(values, scales)--> [+ bias]

    # before:  Gather(weight_VD, ids)                        an embedding
    # after:   GatherBlockQuantized(values, ids, scales)     only the rows taken are widened

`QuantizeWeight` is a composite that stands for bytes of the weight file; `weights.py` takes it
away.

Accuracy level 4: activations are rounded to eight bits, by row and block. Its kernels are exact in
every pair of extremes, also on AVX2 without VNNI, where the int8 MatMulInteger of ONNX Runtime
saturates (`tests/rewrite/test_quantize_exact.py`); so it is what int8 weights use as well.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mla_deploy.rewrite.quantized_weight import parts_of
from mla_deploy.rewrite.rule import Mismatch, Rule, constant, rank, static
from mla_deploy.weight_forms.form import PER_CHANNEL, WeightForm, WeightPlan
from mla_deploy.weight_forms.parts import NBITS, ROWS
from mla_deploy.weight_forms.roles import role_of

MICROSOFT = "com.microsoft"
_INTEGER_PRODUCTS = 4
_LEAST_COLUMNS = 16  # fewer make no block


class QuantizeLinear(Rule):
    """`role` None takes it from the weight's name."""

    def __init__(self, plan: WeightPlan, router_rows: int, role: str | None, bias: bool) -> None:
        super().__init__("quantize_linear")
        self.plan = plan
        self.router_rows = router_rows
        self.role = role
        self.bias = bias

    def pattern(self, op: Any, x: Any, weight: Any, bias: Any) -> Any:
        operands = (x, weight, bias) if self.bias else (x, weight)
        return op.Gemm(*operands, transB=1)

    def check(self, context: Any, weight: ir.Value, **_: Any) -> bool:
        _require_weight(weight)
        if static(weight, 0) == self.router_rows:
            raise Mismatch("a rounded router would choose other experts", weight)
        block_form(self.plan, self.role or role_of(str(weight.name)), static(weight, 1), weight)
        return True

    def rewrite(
        self, op: Any, x: ir.Value, weight: ir.Value, bias: ir.Value | None = None, **_: Any
    ) -> Any:
        role, columns = self.role or role_of(str(weight.name)), static(weight, 1)
        form = block_form(self.plan, role, columns, weight)
        product = nbits_product(
            op, x, parts_of(op, weight, form, NBITS), form, static(weight, 0), columns
        )
        return product if bias is None else op.Add(product, bias)


class QuantizeEmbedding(Rule):
    """`form` is settled by the caller: it has to divide the rows, and a tied head shares it."""

    def __init__(self, form: WeightForm) -> None:
        super().__init__("quantize_embedding")
        self.form = form

    def pattern(self, op: Any, weight: Any, ids: Any) -> Any:
        return op.Gather(weight, ids, _outputs=["out"], _allow_other_attributes=True)

    def check(self, context: Any, weight: ir.Value, out: ir.Value, **_: Any) -> bool:
        _require_weight(weight)
        node = out.producer()
        axis = node.attributes.get_int("axis", 0) if node is not None else None
        if rank(weight) != 2 or axis != 0:
            raise Mismatch("not rows of a matrix", weight)
        if static(weight, 1) % self.form.block:
            raise Mismatch("a row is not a whole number of blocks", weight)
        return True

    def rewrite(self, op: Any, weight: ir.Value, ids: ir.Value, **_: Any) -> Any:
        values, scales, *zeros = parts_of(op, weight, self.form, ROWS)
        return op.GatherBlockQuantized(
            values,
            ids,
            scales,
            *zeros,
            bits=self.form.bits,
            block_size=self.form.block,
            gather_axis=0,
            quantize_axis=1,
            _domain=MICROSOFT,
        )


def rules(plan: WeightPlan, router_rows: int) -> tuple[Any, ...]:
    """Those of a layer's linear maps; they follow the rules that make Gemm of them."""
    return tuple(QuantizeLinear.rule(plan, router_rows, None, bias) for bias in (True, False))


def trunk_rules(plan: WeightPlan, width: int, tied: bool) -> tuple[Any, ...]:
    """Those of the trunk, whose rows have `width` values; a tied head is the embedding's bytes."""
    embedding = embedding_form(plan, width)
    if tied and embedding is not None and plan.form("head") is not None:
        plan = WeightPlan({**plan.forms, "head": embedding}, plan.spelling)
    head = (QuantizeLinear.rule(plan, 0, "head", bias) for bias in (True, False))
    return (*head, *(() if embedding is None else (QuantizeEmbedding.rule(embedding),)))


def embedding_form(plan: WeightPlan, width: int) -> WeightForm | None:
    """The embedding's form with the widest block, at most its own, that divides a row."""
    form = plan.form("embedding")
    if form is None:
        return None
    fits = [block for block in (128, 64, 32, 16) if block <= form.block and width % block == 0]
    return WeightForm(form.kind, fits[0], form.symmetric) if fits else None


def block_form(plan: WeightPlan, role: str, columns: int, weight: ir.Value) -> WeightForm:
    """Raises: Mismatch where the weight stays in float."""
    form = plan.form(role)
    if form is None or form.block == PER_CHANNEL or form.is_float:
        raise Mismatch(f"the plan leaves {role} in float", weight)
    if columns < _LEAST_COLUMNS:
        raise Mismatch(f"{columns} columns are fewer than any block", weight)
    return form


def _require_weight(value: ir.Value) -> None:
    """A weight is an input of the graph, or a free value that will become one."""
    if value.producer() is not None or constant(value) is not None or rank(value) != 2:
        raise Mismatch("the matrix is not a weight", value)


def nbits_product(
    op: Any, x: ir.Value, parts: list[ir.Value], form: WeightForm, rows: int, columns: int
) -> ir.Value:
    return op.MatMulNBits(
        x,
        *parts,
        K=columns,
        N=rows,
        bits=form.bits,
        block_size=form.block,
        accuracy_level=_INTEGER_PRODUCTS,
        _domain=MICROSOFT,
    )
