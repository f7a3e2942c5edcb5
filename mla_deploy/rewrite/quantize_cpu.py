"""quantise: products with a weight -> ONNX Runtime's products with a weight of four or eight bits.

    # before:  x --MatMul(Transpose(weight_NK))-->           an expert: Gemm(x, weight, transB=1)
    # after:   QuantizeWeight(weight) -> values, scales [, zero points]
    #          x --MatMulNBits(values, scales)-->

    # before:  Gather(weight_VD, ids)                        an embedding
    # after:   GatherBlockQuantized(values, ids, scales)     only the rows taken are widened

`QuantizeWeight` is a composite that stands for bytes of the weight file; `weights.py` takes it
away.

Accuracy level 4: activations are rounded to eight bits, by row and block. Its kernels are exact in
every pair of extremes, also on AVX2 without VNNI, where the int8 MatMulInteger of ONNX Runtime
saturates (`tests/rewrite/test_quantize_exact.py`); so it is what int8 weights use as well.

Products of one input (gate and up, q_a and kv_a) stay apart: joined in one node they took 0.98 of
a step's time, within what two runs of one graph differ, and 6 percent more memory.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mla_deploy.rewrite.quantized_weight import parts_of
from mla_deploy.rewrite.rule import MICROSOFT, Mismatch, Rule, constant, rank, static
from mla_deploy.weight_forms.form import PER_CHANNEL, WeightForm, WeightPlan
from mla_deploy.weight_forms.parts import NBITS, ROWS
from mla_deploy.weight_forms.roles import role_of
from mla_deploy.weight_forms.rounded import LEAST_COLUMNS, trunk_form

_INTEGER_PRODUCTS = 4


class QuantizeLinear(Rule):
    """Before `lower_linear`, whose Reshapes around a Gemm this product does without.

    `role` None takes it from the weight's name.
    """

    def __init__(self, plan: WeightPlan, router_rows: int, role: str | None = None) -> None:
        super().__init__("quantize_linear")
        self.plan = plan
        self.router_rows = router_rows
        self.role = role

    def pattern(self, op: Any, x: Any, weight: Any) -> Any:
        return op.MatMul(x, op.Transpose(weight, perm=[1, 0]))

    def check(self, context: Any, weight: ir.Value, **_: Any) -> bool:
        self._form(weight)
        return True

    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value, **_: Any) -> Any:
        form = self._form(weight)
        parts = parts_of(op, weight, form, NBITS)
        return nbits_product(op, x, parts, form, (static(weight, 0), static(weight, 1)))

    def _form(self, weight: ir.Value) -> WeightForm:
        """Raises: Mismatch where the weight stays in float."""
        if weight.producer() is not None or constant(weight) is not None or rank(weight) != 2:
            raise Mismatch("the matrix is not a weight", weight)
        if static(weight, 0) == self.router_rows:
            raise Mismatch("a rounded router would choose other experts", weight)
        role = self.role or role_of(str(weight.name))
        return block_form(self.plan, role, static(weight, 1), weight)


class QuantizeExpert(QuantizeLinear):
    """What `lower_experts` wrote into the branch of an expert."""

    def pattern(self, op: Any, x: Any, weight: Any) -> Any:
        return op.Gemm(x, weight, transB=1)


class QuantizeEmbedding(Rule):
    """`form` is settled by the caller: it has to divide the rows, and a tied head shares it."""

    def __init__(self, form: WeightForm) -> None:
        super().__init__("quantize_embedding")
        self.form = form

    def pattern(self, op: Any, weight: Any, ids: Any) -> Any:
        return op.Gather(weight, ids, _outputs=["out"], _allow_other_attributes=True)

    def check(self, context: Any, weight: ir.Value, out: ir.Value, **_: Any) -> bool:
        node = out.producer()
        axis = node.attributes.get_int("axis", 0) if node is not None else None
        if not weight.is_graph_input() or rank(weight) != 2 or axis != 0:
            raise Mismatch("not rows of a weight", weight)
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


def linear_rules(plan: WeightPlan, router_rows: int) -> tuple[Any, ...]:
    """They come before the rules that make Gemm of a linear layer."""
    return (QuantizeLinear.rule(plan, router_rows),)


def expert_rules(plan: WeightPlan, router_rows: int) -> tuple[Any, ...]:
    """They follow `lower_experts`."""
    return (QuantizeExpert.rule(plan, router_rows),)


def trunk_rules(plan: WeightPlan, width: int, tied: bool) -> tuple[Any, ...]:
    """Those of the trunk, whose rows have `width` values; a tied head is the embedding's bytes."""
    rules = []
    head = trunk_form(plan, "head", width, tied=tied)
    if head is not None:
        own = WeightPlan({"head": head}, plan.spelling)
        rules.append(QuantizeLinear.rule(own, 0, "head"))
    embedding = trunk_form(plan, "embedding", width, tied=tied)
    if embedding is not None:
        rules.append(QuantizeEmbedding.rule(embedding))
    return tuple(rules)


def block_form(plan: WeightPlan, role: str, columns: int, weight: ir.Value) -> WeightForm:
    """Raises: Mismatch where the weight stays in float."""
    form = plan.form(role)
    if form is None or form.block == PER_CHANNEL or form.is_float:
        raise Mismatch(f"the plan leaves {role} in float", weight)
    if columns < LEAST_COLUMNS:
        raise Mismatch(f"{columns} columns are fewer than any block", weight)
    return form


def nbits_product(
    op: Any, x: ir.Value, parts: list[ir.Value], form: WeightForm, shape: tuple[int, int]
) -> ir.Value:
    """x [..., K] times the transpose of a quantised weight [N, K], whose `shape` that is."""
    rows, columns = shape
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
