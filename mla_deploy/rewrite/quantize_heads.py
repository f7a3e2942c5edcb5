"""quantise: the absorbed halves of kv_b_proj, of which both graphs read the same bytes.

    # before:  x_HXI --MatMul(w_HIO)-->                      decode: all heads at once
    # after:   for each head: MatMulNBits(x[h], values[h], scales[h]);  Concat

    # before:  MatMul(latent_B1TL, w_uv_HLV)                 prefill
    # after:   MatMulNBits(latent, values, scales) -> [B, 1, T, H*V] -> [B, H, T, V]

    # before:  MatMul(w_uk_HNL, latent_B1LT)                 prefill
    # after:   the same, of the half made float again: its blocks lie along N, which is not summed

There is no batched product over blocks. One node a head was measured at 2.1 times the speed of the
fp32 product (16 heads, 128 x 512, one token), MatMulInteger with a scale for each column at 1.5,
fp16 weights that are cast at 1.05, ConvInteger in groups at 1.2. One product of every head's query
with every head's weight, of which the diagonal is taken, at half the speed of one node a head; two
heads a node at the same speed.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mla_deploy.rewrite.quantize_cpu import block_form, nbits_product
from mla_deploy.rewrite.quantized_weight import parts_of
from mla_deploy.rewrite.rule import Mismatch, Rule, attribute, ints, nibbles, required, static
from mla_deploy.weight_forms.form import WeightForm, WeightPlan
from mla_deploy.weight_forms.parts import HEADS

_UK, _UV = 0, 1


class _OfHalf(Rule):
    def __init__(self, plan: WeightPlan) -> None:
        super().__init__("quantize_heads")
        self.plan = plan

    def pattern(self, op: Any, x: Any, weight: Any) -> Any:
        return op.MatMul(x, weight)

    def sizes(self, weight: ir.Value) -> tuple[int, int, int]:
        """H, I, O of a half. Raises: Mismatch for any other value."""
        node = weight.producer()
        if node is None or node.op_type != "SplitHeads":
            raise Mismatch("not an absorbed half", weight)
        heads, nope, value = (int(attribute(node, name)) for name in ("heads", "nope", "value"))
        rank = static(required(node.inputs[0]), 1)
        return (heads, nope, rank) if weight.index() == _UK else (heads, rank, value)

    def form(self, weight: ir.Value) -> WeightForm:
        """Raises: Mismatch where the half stays in float."""
        return block_form(self.plan, "kv_b", self.sizes(weight)[1], weight)

    def parts(self, op: Any, weight: ir.Value) -> list[ir.Value]:
        weight.shape = ir.Shape(self.sizes(weight))
        return parts_of(op, weight, self.form(weight), HEADS)


class QuantizeAbsorbed(_OfHalf):
    def check(self, context: Any, weight: ir.Value, **_: Any) -> bool:
        self.form(weight)
        return True

    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value, **_: Any) -> Any:
        (heads, inner, outer), form = self.sizes(weight), self.form(weight)
        parts = self.parts(op, weight)
        if heads == 1:
            return nbits_product(op, x, parts, form, (outer, inner))
        # ONNX Runtime cuts the weight once, when it folds constants.
        rows = [_split(op, part, [outer] * heads) for part in parts]
        products = [
            nbits_product(op, x_1XI, own, form, (outer, inner))
            for x_1XI, *own in zip(_split(op, x, [1] * heads), *rows, strict=True)
        ]
        return op.Concat(*products, axis=0)


class QuantizeValues(_OfHalf):
    def check(self, context: Any, weight: ir.Value, **_: Any) -> bool:
        self.form(weight)
        if weight.index() != _UV:
            raise Mismatch("not w_uv_HLV", weight)
        return True

    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value, **_: Any) -> Any:
        heads, inner, outer = self.sizes(weight)
        form = self.form(weight)
        rows = nbits_product(op, x, self.parts(op, weight), form, (heads * outer, inner))
        return op.Transpose(op.Reshape(rows, ints(op, [0, -1, heads, outer])), perm=[0, 2, 1, 3])


class QuantizeKeys(_OfHalf):
    def pattern(self, op: Any, weight: Any, x: Any) -> Any:
        return op.MatMul(weight, x)

    def check(self, context: Any, weight: ir.Value, **_: Any) -> bool:
        self.form(weight)
        if weight.index() != _UK:
            raise Mismatch("not w_uk_HNL", weight)
        return True

    def rewrite(self, op: Any, weight: ir.Value, x: ir.Value, **_: Any) -> Any:
        (heads, inner, outer), form = self.sizes(weight), self.form(weight)
        wide = widened(op, self.parts(op, weight), form, inner)
        w_HLN = op.Reshape(wide, ints(op, [heads, outer, inner]))
        return op.MatMul(op.Transpose(w_HLN, perm=[0, 2, 1]), x)


def widened(op: Any, parts: list[ir.Value], form: WeightForm, columns: int) -> ir.Value:
    """The float matrix [R, K] of a weight in the layout nbits.

    ONNX Runtime does not fold DequantizeLinear: what it keeps are the bytes, and no float weight.
    """
    values, scales, *zeros = parts
    last = ints(op, [-1])
    if form.bits == 4:
        low, high = nibbles(op, values)
        pairs = op.Concat(op.Unsqueeze(low, last), op.Unsqueeze(high, last), axis=-1)
        values = op.Reshape(pairs, ints(op, [0, 0, -1]))
    if zeros:
        middle = _zeros(op, zeros[0], form, columns)
    else:
        code = op.Constant(value=ir.tensor([2 ** (form.bits - 1)], ir.DataType.UINT8))
        middle = op.Expand(code, op.Shape(scales))
    wide = op.DequantizeLinear(
        values,
        op.Unsqueeze(scales, last),
        op.Unsqueeze(middle, last),
        axis=2,
        block_size=form.block,
    )
    flat = op.Reshape(wide, ints(op, [0, -1]))
    if columns % form.block == 0:
        return flat
    return op.Slice(flat, ints(op, [0]), ints(op, [columns]), ints(op, [1]))


def _zeros(op: Any, packed: ir.Value, form: WeightForm, columns: int) -> ir.Value:
    """Zero points, one a block."""
    if form.bits == 8:
        return packed
    low, high = nibbles(op, packed)
    last = ints(op, [-1])
    pairs = op.Concat(op.Unsqueeze(low, last), op.Unsqueeze(high, last), axis=-1)
    rows = op.Reshape(pairs, ints(op, [0, -1]))
    return op.Slice(rows, ints(op, [0]), ints(op, [form.blocks(columns)]), ints(op, [1]))


def _split(op: Any, value: ir.Value, sizes: list[int]) -> tuple[ir.Value, ...]:
    return tuple(op.Split(value, ints(op, sizes), axis=0, _outputs=len(sizes)))


def absorbed_rules(plan: WeightPlan) -> tuple[Any, ...]:
    return (QuantizeAbsorbed.rule(plan),)


def expanded_rules(plan: WeightPlan) -> tuple[Any, ...]:
    return (QuantizeValues.rule(plan), QuantizeKeys.rule(plan))
