"""lower: attention over a latent stored in bytes -> MatMulIntegerToFloat over the bytes.

    # before:  q_latent, QuantizedUpdate(...) rows, q_rope, rope keys --LatentAttention--> out_BHSL
    # after:   scores = scale_T (codes q8^T) + q_rope rope_keys^T --Softmax--> p_XT
    #          out = sum over blocks of T: (p scale_T)8 codes

Both products are uint8 with the cache as it lies and accumulate exactly in int32. Of the query each
row is two signed numbers of 7 bits (coarse and fine, 126 fine steps to a coarse one): ONNX Runtime
adds pairs of uint8 x int8 products in 16 bits, which 255 x 63 x 2 does not leave. Of the
probabilities, times the scales of their tokens, each row is two bytes (255 fine steps to a coarse
one) with one scale for each block of tokens, so that a token that takes nearly all attention does
not round the others away. What is left is the rounding of the cache itself.

A rope key stored in bytes is widened: its values are few, and its tiles would be as many products.

Many rows at once (a chunk of new tokens times heads) pay for widening the latent once; so do few
cached tokens, where the steps above cost more than they save, and fp8 codes, which are not numbers
that multiply.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from mla_deploy.latent_store import BLOCKS, TINY, LatentStore, find_store
from mla_deploy.rewrite.latent_codes import Plane, decode, planes
from mla_deploy.rewrite.lower_attention import (
    Attend,
    Choice,
    Folding,
    LowerLatentAttention,
    Rows,
    few_or_all,
    folded,
    is_one_new,
    rows_of,
)
from mla_deploy.rewrite.lower_choice import selected
from mla_deploy.rewrite.rule import (
    DOMAIN,
    MASKED,
    MICROSOFT,
    Body,
    Mismatch,
    as_fp32,
    attribute,
    ints,
    number,
    producer,
    required,
    required_node,
    static,
    swapped,
)

# Rows (heads times new tokens) up to which bytes are multiplied; above, they are widened.
_MOST_ROWS = 128
# Cached tokens from which on bytes are multiplied.
_LEAST_TOKENS = 1536
# A block is the widest of these that divides T; else all of T are one, up to where int32 might not
# hold their sum.
_BLOCKS = BLOCKS
_LONGEST = 1 << 16
_COARSE, _FINE, _PARTS = 63.0, 126.0, 255.0
Mask = Callable[[Any, ir.Value], ir.Value]  # scores as what is built sees them

_FLOAT, _INT8, _UINT8 = ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.UINT8


class LowerIntegerAttention(LowerLatentAttention):
    """The latent's rows come of a QuantizedUpdate or a QuantizedRead."""

    def check(self, context: Any, latent: ir.Value, rope_key: ir.Value, **_: Any) -> bool:
        if _stored(latent) is None:
            raise Mismatch("the latent is not stored in bytes", latent)
        if static(rope_key, -1) and _stored(rope_key) is None:
            rows_of(rope_key)
        return True

    def rewrite(
        self,
        op: Any,
        q_latent: ir.Value,
        q_rope: ir.Value,
        latent: ir.Value,
        rope_key: ir.Value,
        visible: ir.Value,
        out: ir.Value,
        sinks: ir.Value | None = None,
        **_: Any,
    ) -> Any:
        node = required_node(out)
        scale = op.Constant(value_float=float(attribute(node, "scale")))
        parts = [q_latent] if static(rope_key, -1) == 0 else [q_latent, q_rope]
        choice = producer(visible, "SelectVisible", DOMAIN)
        like = visible if choice is None else required(choice.inputs[0])
        latents = StoredBytes.of(op, latent)
        keys: list[Rows | StoredBytes] = []
        if len(parts) > 1:
            is_stored = _stored(rope_key) is not None
            keys = [StoredBytes.of(op, rope_key) if is_stored else Rows.of(op, rows_of(rope_key))]
        step = AttendBytes(
            [
                folded(op, op.Mul(part, scale), width)
                for part, width in zip(parts, (latents.width, static(rope_key, -1)), strict=False)
            ],
            latents,
            keys,
            Folding.of(op, int(attribute(node, "heads")), like),
            sinks,
        )
        if choice is None:
            # Only the plan's own mask is all true when all is visible to the plan.
            return step.dense(op, visible, latents.plain if visible.producer() is None else None)
        seen, chosen = (required(value) for value in choice.inputs)
        if not step.multiplies:
            return step.dense(op, selected(op, seen, chosen))
        return few_or_all(
            op,
            (seen, chosen),
            few=lambda body: step.chosen(body, Choice.of(body, seen, chosen)),
            rest=lambda body, _: step.dense(body, selected(body, seen, chosen)),
        )


@dataclass(frozen=True)
class StoredBytes:
    """Rows of `width` values as they are stored; scales are fp32, of a stale slot zero.

    `plain` tells when each new token sees every slot.
    """

    codes_B1TC: ir.Value
    scales_B1TG: ir.Value
    store: LatentStore
    width: int
    plain: ir.Value

    @classmethod
    def of(cls, op: Any, rows: ir.Value) -> StoredBytes:
        source, width = required_node(rows), static(rows, -1)
        store = find_store(str(attribute(source, "store")))
        is_read = source.op_type == "QuantizedRead"
        codes, scales = (source.inputs if is_read else source.outputs)[:2]
        filled, plain = (required(value) for value in source.inputs[2 if is_read else 3 :][:2])
        held = as_fp32(op, required(scales), required(source.inputs[1]))
        kept = (filled, held, number(op, 0))
        if store.tiles(width) > 1:
            return cls(required(codes), op.Where(*kept), store, width, plain)
        # With the tokens last: along an axis of one, Where goes number by number.
        flat = [op.Reshape(value, ints(op, [0, 1, 1, -1])) for value in kept[:2]]
        cleared = op.Reshape(op.Where(*flat, kept[2]), ints(op, [0, 1, -1, 1]))
        return cls(required(codes), cleared, store, width, plain)

    def widened(self, op: Any) -> ir.Value:
        """[B, 1, T, W] in fp32."""
        return decode(op, self.codes_B1TC, self.scales_B1TG, self.store, self.width)

    def planes(self, op: Any) -> list[Plane]:
        return planes(op, self.codes_B1TC, self.scales_B1TG, self.store, self.width)

    def chosen(self, op: Any, choice: Choice) -> StoredBytes:
        return replace(
            self,
            codes_B1TC=choice.rows(op, self.codes_B1TC),
            scales_B1TG=choice.rows(op, self.scales_B1TG),
        )


@dataclass(frozen=True)
class AttendBytes:
    """One attention: queries for latent and rope keys (folded rows X = H*S, scaled)."""

    queries: list[ir.Value]
    latents: StoredBytes
    rope_keys: list[Rows | StoredBytes]
    folding: Folding
    sinks: ir.Value | None

    @property
    def multiplies(self) -> bool:
        """Whether bytes are ever multiplied: codes are numbers, and one new token is few rows."""
        return self.folding.heads <= _MOST_ROWS and not self.latents.store.is_float

    def dense(self, op: Any, visible: ir.Value, plain: ir.Value | None = None) -> ir.Value:
        """Over every row; `plain` tells when nothing has to be masked. [B, H, S, L]."""
        if not self.multiplies:
            return self._widened(op, visible)
        most = _MOST_ROWS // self.folding.heads
        one, several, wide = Body("one"), Body("several"), Body("wide")
        one_out = self.multiplied(one, _masked_by(visible), plain)
        some_out = self.multiplied(
            several,
            lambda body, scores: self.folding.masked(body, scores, visible),
            plain,
            _square(several, self.queries[0]),
        )
        narrow = Body("bytes")
        narrow_out = narrow.If(
            is_one_new(narrow, visible),
            then_branch=one.graph(one_out),
            else_branch=several.graph(some_out),
        )
        wide_out = self._widened(wide, visible)
        rows_1 = op.Shape(self.latents.codes_B1TC, start=2, end=3)
        few = op.LessOrEqual(self.folding.new_tokens, ints(op, [most]))
        many = op.GreaterOrEqual(rows_1, ints(op, [_LEAST_TOKENS]))
        fits = op.LessOrEqual(_block(op, self.latents.codes_B1TC), ints(op, [_LONGEST]))
        out: ir.Value = op.If(
            op.And(op.And(few, many), fits),
            then_branch=narrow.graph(narrow_out),
            else_branch=wide.graph(wide_out),
        )
        return out

    def chosen(self, op: Any, choice: Choice) -> ir.Value:
        """Over the rows that one new token has chosen. [B, H, 1, L]."""
        keys = [
            key.chosen(op, choice)
            if isinstance(key, StoredBytes)
            else replace(key, rows_B1TW=choice.rows(op, key.rows_B1TW))
            for key in self.rope_keys
        ]
        step = replace(self, latents=self.latents.chosen(op, choice), rope_keys=keys)
        return step.multiplied(op, _masked_by(choice.seen_B11K))

    def multiplied(
        self, op: Any, mask: Mask, plain: ir.Value | None = None, eye_XX: ir.Value | None = None
    ) -> ir.Value:
        """Products of bytes. [B, H, S, L]. `eye_XX` None: of one new token, X is H."""
        found = self.latents.planes(op)
        if eye_XX is None:
            eye_XX = op.Constant(value=ir.tensor(np.eye(self.folding.heads, dtype=np.float32)))
        terms = [self._scores(op, plane, eye_XX) for plane in found]
        for query, key in zip(self.queries[1:], self._keys(op), strict=True):
            terms.append(op.MatMul(query, swapped(op, key.rows_B1TW)))
        scores_B1XT = functools.reduce(op.Add, terms)
        weights_B1XT = self._weights(op, scores_B1XT, mask, plain)
        outs = [self._read(op, weights_B1XT, plane, eye_XX) for plane in found]
        out_B1XL = outs[0] if len(outs) == 1 else op.Concat(*outs, axis=3)
        return required(
            op.Reshape(out_B1XL, ints(op, [0, self.folding.heads, -1, self.latents.width]))
        )

    def _weights(self, op: Any, scores_B1XT: ir.Value, mask: Mask, plain: ir.Value | None) -> Any:
        """Probabilities. Masking copies the scores, so it is left out where nothing is masked."""
        softmax = self._attend().softmax
        if plain is None:
            return softmax(op, mask(op, scores_B1XT))
        bare, some = Body("bare"), Body("masked")
        bare_out = softmax(bare, scores_B1XT)
        some_out = softmax(some, mask(some, scores_B1XT))
        return op.If(plain, then_branch=bare.graph(bare_out), else_branch=some.graph(some_out))

    def _scores(self, op: Any, plane: Plane, eye_XX: ir.Value) -> ir.Value:
        """scale_T (query codes^T): [B, 1, X, T]."""
        query = self.queries[0]
        if plane.width != self.latents.width:
            edges = (ints(op, [plane.first]), ints(op, [plane.first + plane.width]))
            query = op.Slice(query, *edges, ints(op, [3]))
        peak = op.ReduceMax(op.Abs(query), ints(op, [3]), keepdims=1)
        step_B1X1 = op.Div(op.Max(peak, number(op, TINY)), number(op, _COARSE))
        ratio = op.Div(query, step_B1X1)
        coarse = op.Round(ratio)
        fine = op.QuantizeLinear(op.Sub(ratio, coarse), number(op, 1 / _FINE), _zero(op, _INT8))
        parts_B1YK = op.Concat(op.Cast(coarse, to=_INT8), fine, axis=2)
        turned_B1KY = swapped(op, parts_B1YK)
        raw_B1TY = _product(op, plane.codes_B1TK, turned_B1KY, self._zero(op), _zero(op, _INT8))
        # One product scales the rows, adds fine to coarse, and turns [T, 2X] to [X, T].
        pair = op.Concat(eye_XX, op.Div(eye_XX, number(op, _FINE)), axis=1)
        joined_B1XY = op.Mul(pair, step_B1X1)
        turned = op.MatMul(joined_B1XY, swapped(op, raw_B1TY))
        return required(op.Mul(turned, plane.scale_B11T))

    def _read(self, op: Any, weights_B1XT: ir.Value, plane: Plane, eye_XX: ir.Value) -> ir.Value:
        """weights times the plane's values: [B, 1, X, K]."""
        block_1 = _block(op, plane.codes_B1TK)
        rows_1 = op.Shape(weights_B1XT, start=2, end=3)
        shape = op.Concat(ints(op, [0]), rows_1, ints(op, [-1]), block_1, axis=0)
        share_BXUT = op.Reshape(op.Mul(weights_B1XT, plane.scale_B11T), shape)
        peak = op.ReduceMax(share_BXUT, ints(op, [3]), keepdims=1)
        step_BXU1 = op.Div(op.Max(peak, number(op, TINY)), number(op, _PARTS))
        ratio = op.Div(share_BXUT, step_BXU1)
        coarse = op.Cast(ratio, to=_UINT8)  # cut, not rounded: what is left is not negative
        left = op.Sub(ratio, op.Cast(coarse, to=_FLOAT))
        fine = op.QuantizeLinear(left, number(op, 1 / _PARTS), _zero(op, _UINT8))
        parts_BUYT = op.Transpose(op.Concat(coarse, fine, axis=1), perm=[0, 2, 1, 3])
        blocks = op.Reshape(
            op.Squeeze(plane.codes_B1TK, ints(op, [1])),
            op.Concat(ints(op, [0, -1]), block_1, ints(op, [plane.width]), axis=0),
        )
        raw_BUYK = _product(op, parts_BUYT, blocks, _zero(op, _UINT8), self._zero(op))
        # One product scales each block's parts and adds them up: [X, U*2X] x [U*2X, K].
        flat = op.Reshape(raw_BUYK, ints(op, [0, 1, -1, plane.width]))
        pair_X1Y = op.Unsqueeze(
            op.Concat(eye_XX, op.Div(eye_XX, number(op, _PARTS)), axis=1), ints(op, [1])
        )
        joined = op.Mul(step_BXU1, pair_X1Y)
        joined_B1XZ = op.Reshape(
            joined, op.Concat(ints(op, [0, 1]), rows_1, ints(op, [-1]), axis=0)
        )
        return required(op.MatMul(joined_B1XZ, flat))

    def _widened(self, op: Any, visible: ir.Value) -> ir.Value:
        latent = Rows(self.latents.widened(op), None, None)
        return self._attend([latent, *self._keys(op)]).dense(op, visible, None)

    def _keys(self, op: Any) -> list[Rows]:
        """Rope keys in fp32."""
        return [
            Rows(key.widened(op), None, None) if isinstance(key, StoredBytes) else key
            for key in self.rope_keys
        ]

    def _attend(self, rows: Sequence[Rows] = ()) -> Attend:
        return Attend(self.queries, list(rows), self.latents.width, self.folding, self.sinks)

    def _zero(self, op: Any) -> ir.Value:
        return required(op.Constant(value=ir.tensor(self.latents.store.zero, _UINT8)))


def _masked_by(visible: ir.Value) -> Mask:
    """Of one new token the folded rows are the heads, and the mask is the same for all."""

    def masked(op: Any, scores_B1XT: ir.Value) -> ir.Value:
        return required(op.Where(visible, scores_B1XT, op.Constant(value_float=MASKED)))

    return masked


def _square(op: Any, query_B1XI: ir.Value) -> ir.Value:
    """The identity of [X, X]."""
    rows_1 = op.Shape(query_B1XI, start=2, end=3)
    shape = op.Concat(rows_1, rows_1, axis=0)
    return required(op.EyeLike(op.ConstantOfShape(shape), dtype=_FLOAT))


def _block(op: Any, codes_B1TK: ir.Value) -> ir.Value:
    """Tokens of one block, int64 [1]."""
    rows_1 = op.Shape(codes_B1TK, start=2, end=3)
    block_1 = rows_1
    for size in sorted(_BLOCKS):
        divides = op.Equal(op.Mod(rows_1, ints(op, [size])), ints(op, [0]))
        block_1 = op.Where(divides, ints(op, [size]), block_1)
    return required(block_1)


def _stored(rows: ir.Value) -> ir.Node | None:
    """The composite that keeps these rows in bytes, where one does."""
    found = (producer(rows, op_type, DOMAIN) for op_type in ("QuantizedUpdate", "QuantizedRead"))
    return next(filter(None, found), None)


def _product(
    op: Any, left: ir.Value, right: ir.Value, left_zero: ir.Value, right_zero: ir.Value
) -> ir.Value:
    """Summed in int32, given in fp32: widened while it is in the processor's cache.

    MatMulInteger and a Cast took 1.35 times as long (scores of 32k tokens).
    """
    one = number(op, 1)
    zeros = (left_zero, right_zero)
    return required(op.MatMulIntegerToFloat(left, right, one, one, *zeros, _domain=MICROSOFT))


def _zero(op: Any, dtype: ir.DataType) -> ir.Value:
    return required(op.Constant(value=ir.tensor(0, dtype)))


RULES = tuple(LowerIntegerAttention.rule("lower_latent_attention", s) for s in (False, True))
