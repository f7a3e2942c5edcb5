"""lower: attention over the latent cache -> MatMul / Softmax / MatMul, for ONNX Runtime on a CPU.

    # before:  [q_latent | q_rope], rows_B1TW = CacheUpdate(...) --LatentAttention--> out_BHSL
    # after:   scores = (cache q^T)^T --Softmax--> probabilities --MatMul(cache)--> [..., :L]

Heads are folded into rows, so that one matrix product [B, 1, T, W] x [B, 1, H*S, W]^T serves all
heads (4 to 8 times faster there than the Attention operator with one shared key head). The cache is
the first operand of both products, which that runtime multiplies faster than the second: with few
heads the output is made transposed, cache^T probabilities^T. The probabilities multiply the whole
fused row: slicing the small result is free and slicing the cache copies it.

When each new token sees every slot nothing is masked. Otherwise a masked score is replaced, and
stale rows are cleared, because a probability of zero times a NaN is a NaN; that copies the cache.

A sparse layer's one new token attends to the rows it has chosen, and to no other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from mla_deploy.rewrite.lower_choice import every_is_chosen, selected
from mla_deploy.rewrite.rule import (
    DOMAIN,
    MASKED,
    Body,
    Mismatch,
    Rule,
    as_fp32,
    attribute,
    constant,
    ints,
    producer,
    required,
    required_node,
    static,
    swapped,
)

_SOURCES = ("CacheUpdate", "CacheRead", "RingUpdate")
# Up to so many heads ONNX Runtime multiplies cache^T probabilities^T faster than the other way
# (0.8 of the time at 8k tokens and 16 heads; with 40 it is level, with 128 slower).
_FEW_HEADS = 32


class LowerLatentAttention(Rule):
    def __init__(self, name: str, sinks: bool) -> None:
        super().__init__(name)
        self.sinks = sinks

    def pattern(
        self,
        op: Any,
        q_latent: Any,
        q_rope: Any,
        latent: Any,
        rope_key: Any,
        visible: Any,
        sinks: Any,
    ) -> Any:
        attend = op.LatentSinkAttention if self.sinks else op.LatentAttention
        return attend(
            q_latent,
            q_rope,
            latent,
            rope_key,
            visible,
            *((sinks,) if self.sinks else ()),
            _domain=DOMAIN,
            _outputs=["out"],
            _allow_other_attributes=True,
        )

    def check(self, context: Any, latent: ir.Value, rope_key: ir.Value, **_: Any) -> bool:
        _row_sources(latent, rope_key)
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
        sources = _row_sources(latent, rope_key)
        parts = [q_latent] if static(rope_key, -1) == 0 else [q_latent, q_rope]
        heads, rank = int(attribute(node, "heads")), static(latent, -1)
        widths = [rank, static(rope_key, -1)]
        if len(parts) > len(sources):
            parts, widths = [op.Concat(*parts, axis=-1)], [sum(widths)]
        scale = op.Constant(value_float=float(attribute(node, "scale")))
        queries = [
            folded(op, op.Mul(part, scale), width)
            for part, width in zip(parts, widths, strict=False)
        ]
        rows = [Rows.of(op, source) for source in sources]
        choice = producer(visible, "SelectVisible", DOMAIN)
        # Its shape is that of the mask behind it, which is there anyway.
        like = visible if choice is None else required(choice.inputs[0])
        step = Attend(queries, rows, rank, Folding.of(op, heads, like), sinks)
        if choice is None or sources[0].op_type == "RingUpdate":
            return step.dense(op, visible, _all_visible(step, visible))
        return _sparse(op, step, *(required(value) for value in choice.inputs))


@dataclass(frozen=True)
class Rows:
    """Cached rows as they lie, and what is stale among them (None: they are cleared already)."""

    rows_B1TW: ir.Value
    filled_B1T1: ir.Value | None
    all_visible: ir.Value | None

    @classmethod
    def of(cls, op: Any, source: ir.Node) -> Rows:
        if source.op_type == "RingUpdate":
            return cls(source.outputs[1], None, None)
        if source.op_type == "CacheRead":
            cache, filled, all_visible = (required(value) for value in source.inputs)
            return cls(as_fp32(op, cache, cache), filled, all_visible)
        rows = as_fp32(op, source.outputs[0], required(source.inputs[0]))
        return cls(rows, required(source.inputs[2]), required(source.inputs[3]))


@dataclass(frozen=True)
class Folding:
    """How scores unfold around a mask that is per new token. Made outside of any branch, where
    shapes can be told ahead of a run.
    """

    heads: int
    apart: ir.Value  # [B, H, S, T]
    folded: ir.Value  # [B, 1, H*S, T]
    new_tokens: ir.Value  # int64 [1]

    @classmethod
    def of(cls, op: Any, heads: int, visible: ir.Value) -> Folding:
        apart = op.Concat(ints(op, [0, heads]), op.Shape(visible, start=2), axis=0)
        folded = op.Concat(ints(op, [0, 1, -1]), op.Shape(visible, start=3), axis=0)
        return cls(heads, apart, folded, op.Shape(visible, start=2, end=3))

    def masked(self, op: Any, scores_B1XT: ir.Value, visible: ir.Value) -> ir.Value:
        scores_BHST = op.Reshape(scores_B1XT, self.apart)
        masked = op.Where(visible, scores_BHST, op.Constant(value_float=MASKED))
        out: ir.Value = op.Reshape(masked, self.folded)
        return out


@dataclass(frozen=True)
class Choice:
    """Which cached tokens one new token has chosen, and which of these it may see."""

    index_BK1: ir.Value
    seen_B11K: ir.Value

    @classmethod
    def of(cls, op: Any, visible: ir.Value, chosen_B1K: ir.Value) -> Choice:
        index_B1K = op.Cast(chosen_B1K, to=ir.DataType.INT64)
        index_BK1 = op.Transpose(index_B1K, perm=[0, 2, 1])
        index_B11K = op.Unsqueeze(index_B1K, ints(op, [1]))
        # A choice of -1 is none, and would be read as the last token.
        is_token_B11K = op.GreaterOrEqual(index_B11K, op.Constant(value_int=0))
        seen_B11K = op.And(op.GatherElements(visible, index_B11K, axis=3), is_token_B11K)
        return cls(index_BK1, seen_B11K)

    def rows(self, op: Any, rows_B1TW: ir.Value) -> ir.Value:
        """The chosen of cached rows: [B, 1, K, W]."""
        rows_BTW = op.Squeeze(rows_B1TW, ints(op, [1]))
        taken_BKW = op.GatherND(rows_BTW, self.index_BK1, batch_dims=1)
        return required(op.Unsqueeze(taken_BKW, ints(op, [1])))


@dataclass(frozen=True)
class Attend:
    """One attention: a query for each row tensor (folded rows, scaled); values are the first's."""

    queries: list[ir.Value]
    rows: list[Rows]
    rank: int
    folding: Folding
    sinks: ir.Value | None

    def dense(self, op: Any, visible: ir.Value, plain: ir.Value | None) -> ir.Value:
        """Over every row; `plain` tells when nothing has to be masked or cleared. [B, H, S, L]."""
        keys = [rows.rows_B1TW for rows in self.rows]
        scores_B1XT = self._scores(op, keys)
        if plain is None:
            weights = self.softmax(op, self.folding.masked(op, scores_B1XT, visible))
            values = keys[0]
            if self.rows[0].filled_B1T1 is not None:
                values = _cleared(op, values, self.rows[0].filled_B1T1)
            return self._heads(op, self._read(op, weights, values))
        bare = Body("bare")
        bare_out = self._read(bare, self.softmax(bare, scores_B1XT), keys[0])
        stale = Body("stale")
        weights = self.softmax(stale, self.folding.masked(stale, scores_B1XT, visible))
        values = _cleared(stale, keys[0], self.rows[0].filled_B1T1)
        stale_out = self._read(stale, weights, values)
        out_B1XW = op.If(
            plain, then_branch=bare.graph(bare_out), else_branch=stale.graph(stale_out)
        )
        return self._heads(op, out_B1XW)

    def chosen(self, op: Any, visible: ir.Value, chosen_B1K: ir.Value) -> ir.Value:
        """Over the chosen rows of one new token. [B, H, 1, L]."""
        choice = Choice.of(op, visible, chosen_B1K)
        seen_B11K, seen_B1K1 = choice.seen_B11K, swapped(op, choice.seen_B11K)
        keys = [_cleared(op, choice.rows(op, rows.rows_B1TW), seen_B1K1) for rows in self.rows]
        # One new token: the folded rows are the heads, and the mask is the same for all.
        masked = op.Constant(value_float=MASKED)
        scores_B1XK = op.Where(seen_B11K, self._scores(op, keys), masked)
        return self._heads(op, op.MatMul(self.softmax(op, scores_B1XK), keys[0]))

    def _scores(self, op: Any, keys: list[ir.Value]) -> ir.Value:
        products = [
            swapped(op, op.MatMul(key, swapped(op, query)))
            for key, query in zip(keys, self.queries, strict=True)
        ]
        return products[0] if len(products) == 1 else op.Add(*products)

    def softmax(self, op: Any, scores_B1XT: ir.Value) -> ir.Value:
        """Over the cached tokens, and where there are sinks with their share left out."""
        if self.sinks is None:
            return op.Softmax(scores_B1XT, axis=-1)
        one = ints(op, [1])
        shape_B1X = op.Shape(scores_B1XT, start=0, end=3)
        heads = ints(op, [self.folding.heads])
        sinks_HS = op.Expand(
            op.Unsqueeze(self.sinks, one), op.Concat(heads, self.folding.new_tokens, axis=0)
        )
        sinks_B1X1 = op.Expand(
            op.Reshape(sinks_HS, ints(op, [1, 1, -1, 1])), op.Concat(shape_B1X, one, axis=0)
        )
        shares = op.Softmax(op.Concat(scores_B1XT, sinks_B1X1, axis=-1), axis=-1)
        return op.Slice(shares, ints(op, [0]), ints(op, [-1]), ints(op, [3]))

    def _read(self, op: Any, weights_B1XT: ir.Value, rows_B1TW: ir.Value) -> ir.Value:
        """weights times rows: [B, 1, X, W]."""
        if self.folding.heads > _FEW_HEADS:
            return required(op.MatMul(weights_B1XT, rows_B1TW))
        out_B1WX = op.MatMul(swapped(op, rows_B1TW), swapped(op, weights_B1XT))
        return swapped(op, out_B1WX)

    def _heads(self, op: Any, out_B1XW: ir.Value) -> ir.Value:
        """[B, 1, H*S, W] -> [B, H, S, L]."""
        out_B1XL = out_B1XW
        if len(self.queries) == 1:
            out_B1XL = op.Slice(out_B1XW, ints(op, [0]), ints(op, [self.rank]), ints(op, [3]))
        return op.Reshape(out_B1XL, ints(op, [0, self.folding.heads, -1, self.rank]))


def few_or_all(
    op: Any,
    choice: tuple[ir.Value, ir.Value],
    *,
    few: Callable[[Body], ir.Value],
    rest: Callable[[Body, ir.Value], ir.Value],
) -> ir.Value:
    """One new token with more rows than it chose reads those; else the choice is a mask.

    `choice`: visible, and the chosen rows. `rest` is told whether every row is chosen.
    """
    every = every_is_chosen(op, *choice)
    one_new = is_one_new(op, choice[0])
    few_rows, all_rows = Body("few"), Body("rows")
    few_out, all_out = few(few_rows), rest(all_rows, every)
    out: ir.Value = op.If(
        op.And(one_new, op.Not(every)),
        then_branch=few_rows.graph(few_out),
        else_branch=all_rows.graph(all_out),
    )
    return out


def _sparse(op: Any, step: Attend, visible: ir.Value, chosen: ir.Value) -> ir.Value:
    def rest(body: Body, every: ir.Value) -> ir.Value:
        all_visible = _all_visible(step, visible)
        plain = None if all_visible is None else body.And(all_visible, every)
        return step.dense(body, selected(body, visible, chosen), plain)

    few = functools.partial(step.chosen, visible=visible, chosen_B1K=chosen)
    return few_or_all(op, (visible, chosen), few=few, rest=rest)


def is_one_new(op: Any, visible_B1ST: ir.Value) -> ir.Value:
    """Bool scalar: S is 1."""
    new = op.Squeeze(op.Shape(visible_B1ST, start=2, end=3))
    return required(op.Equal(new, op.Constant(value_int=1)))


def _all_visible(step: Attend, visible: ir.Value) -> ir.Value | None:
    """Tells that `visible` is all true. None: only the plan's own mask is when all is visible to
    the plan, and this one is the layer's.
    """
    return step.rows[0].all_visible if visible.producer() is None else None


def _cleared(op: Any, rows: ir.Value, filled: ir.Value | None) -> ir.Value:
    cleared: ir.Value = op.Where(required(filled), rows, op.Constant(value_float=0.0))
    return cleared


def _row_sources(latent: ir.Value, rope_key: ir.Value) -> list[ir.Node]:
    """What holds latent and rope key: one node when they are one row, or there is no rope key.

    Raises: Mismatch.
    """
    rank, rope = static(latent, -1), static(rope_key, -1)
    sliced = producer(latent, "Slice")
    if sliced is None:
        first = rows_of(latent)
        return [first] if rope == 0 else [first, rows_of(rope_key)]
    row = required(sliced.inputs[0])
    other = producer(rope_key, "Slice")
    if other is None or other.inputs[0] is not row:
        raise Mismatch("latent and rope key are not slices of one row", rope_key)
    starts = (_slice_start(latent), _slice_start(rope_key))
    if (*starts, static(row, -1)) != (0, rank, rank + rope):
        raise Mismatch("the row is not [latent | rope key]", rope_key)
    return [rows_of(row)]


def row_source(latent: ir.Value, rope_key: ir.Value) -> ir.Value:
    """The rows [latent | rope key] that both are slices of. Raises: Mismatch when apart."""
    sources = _row_sources(latent, rope_key)
    if len(sources) != 1:
        raise Mismatch("latent and rope key are not one row", rope_key)
    return sources[0].outputs[0 if sources[0].op_type == "CacheRead" else 1]


def rows_of(rows: ir.Value) -> ir.Node:
    """The composite whose cached rows these are. Raises: Mismatch."""
    for op_type in _SOURCES:
        node = producer(rows, op_type, DOMAIN)
        if node is not None:
            return node
    raise Mismatch("not the rows of a cache", rows)


def _slice_start(value: ir.Value) -> int:
    start = constant(required(required_node(value).inputs[1]))
    if start is None or start.size != 1:
        raise Mismatch("the slice is not along one axis", value)
    return int(start.item())


def folded(op: Any, x_BHSI: ir.Value, width: int) -> ir.Value:
    """[B, H, S, I] -> [B, 1, H*S, I], I the `width`: the heads become rows of one product."""
    return required(op.Reshape(x_BHSI, ints(op, [0, 1, -1, width])))


RULES = tuple(LowerLatentAttention.rule("lower_latent_attention", s) for s in (False, True))
