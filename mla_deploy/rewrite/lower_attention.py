"""lower: attention composites -> MatMul / Softmax / MatMul, for ONNX Runtime on a CPU.

Two forms. *Absorbed* reads the cache as it lies: heads are folded into rows, so that one matrix
product [B, 1, H*S, L+R] x [B, 1, T, L+R]^T serves all heads (4 to 8 times faster there than the
Attention operator with one shared key head), and the probabilities multiply the whole fused row
because slicing the small result is free and slicing the cache copies it. *Expanded* makes keys
and values per head, for prefill.

Stale slots: a masked score is replaced, but a probability of zero times a NaN is a NaN, so values
are cleared too. That copies the cache, hence only when some row really has a stale slot.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mla_deploy.rewrite.absorb import (
    expansion_sizes,
    split_heads,
    split_query,
)
from mla_deploy.rewrite.rule import (
    DOMAIN,
    MASKED,
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


class LowerFusedRow(Rule):
    """LatentAttention whose latent and rope key are two slices of one cached row.

    # before:  rows_B1TW --Slice[:L]--> latent --+
    #          rows_B1TW --Slice[L:]--> rope key-LatentAttention -> out_BHSL
    # after:   [q_latent | q_rope]_B1XW --MatMul(cache^T)--> Softmax --MatMul(cache)--> [..., :L]
    """

    def pattern(
        self, op: Any, q_latent: Any, q_rope: Any, latent: Any, rope_key: Any, visible: Any
    ) -> Any:
        return _latent_attention(op, q_latent, q_rope, latent, rope_key, visible)

    def check(self, context: Any, latent: ir.Value, rope_key: ir.Value, **_: Any) -> bool:
        update = _cache_update(latent, sliced=True)
        if update is not _cache_update(rope_key, sliced=True):
            raise Mismatch("latent and rope key are not slices of one row", rope_key)
        first, second = _slice_start(latent), _slice_start(rope_key)
        rank, width = static(latent, -1), static(update.outputs[1], -1)
        if (first, second, width) != (0, rank, rank + static(rope_key, -1)):
            raise Mismatch("the row is not [latent | rope key]", rope_key)
        return True

    def rewrite(
        self,
        op: Any,
        q_latent: ir.Value,
        q_rope: ir.Value,
        latent: ir.Value,
        visible: ir.Value,
        out: ir.Value,
        **_: Any,
    ) -> Any:
        node = required_node(out)
        heads, rank = int(attribute(node, "heads")), static(latent, -1)
        cache = Cached(op, _cache_update(latent, sliced=True))
        q_BHSW = op.Mul(op.Concat(q_latent, q_rope, axis=-1), _scale(op, node))
        q_B1XW = _rows(op, q_BHSW)
        scores_B1XT = op.MatMul(q_B1XW, swapped(op, cache.rows_B1TW))
        probabilities_B1XT = _softmax(op, scores_B1XT, visible, heads)
        out_B1XW = cache.weighted(op, probabilities_B1XT)
        out_B1XL = op.Slice(out_B1XW, ints(op, [0]), ints(op, [rank]), ints(op, [3]))
        return _heads(op, out_B1XL, heads, rank)


class LowerSplitRows(Rule):
    """LatentAttention with the latent and the rope key in caches of their own."""

    def pattern(
        self, op: Any, q_latent: Any, q_rope: Any, latent: Any, rope_key: Any, visible: Any
    ) -> Any:
        return _latent_attention(op, q_latent, q_rope, latent, rope_key, visible)

    def check(self, context: Any, latent: ir.Value, rope_key: ir.Value, **_: Any) -> bool:
        _cache_update(latent, sliced=False)
        _cache_update(rope_key, sliced=False)
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
        **_: Any,
    ) -> Any:
        node = required_node(out)
        heads, rank = int(attribute(node, "heads")), static(latent, -1)
        latents = Cached(op, _cache_update(latent, sliced=False))
        keys = Cached(op, _cache_update(rope_key, sliced=False))
        scale = _scale(op, node)
        q_latent_B1XL = _rows(op, op.Mul(q_latent, scale))
        q_rope_B1XR = _rows(op, op.Mul(q_rope, scale))
        scores_B1XT = op.Add(
            op.MatMul(q_latent_B1XL, swapped(op, latents.rows_B1TW)),
            op.MatMul(q_rope_B1XR, swapped(op, keys.rows_B1TW)),
        )
        probabilities_B1XT = _softmax(op, scores_B1XT, visible, heads)
        return _heads(op, latents.weighted(op, probabilities_B1XT), heads, rank)


class LowerExpanded(Rule):
    """Attention over an expanded latent, heads apart, the rope key never copied per head.

    # before:  Attention(query, ExpandLatent(latent, rope key, w_kv_b))
    # after:   scores = q_nope (w_uk latent^T) + q_rope rope_key^T
    #          out = softmax(scores) (latent w_uv)
    """

    def pattern(
        self, op: Any, query: Any, latent: Any, rope_key: Any, w_kv_b: Any, visible: Any
    ) -> Any:
        key, value = op.ExpandLatent(
            latent,
            rope_key,
            w_kv_b,
            _domain=DOMAIN,
            _outputs=["key", "value"],
            _allow_other_attributes=True,
        )
        return op.Attention(
            query,
            key,
            value,
            visible,
            _domain=DOMAIN,
            _outputs=["out"],
            _allow_other_attributes=True,
        )

    def check(
        self, context: Any, latent: ir.Value, w_kv_b: ir.Value, key: ir.Value, **_: Any
    ) -> bool:
        expansion_sizes(key, latent, w_kv_b)
        return True

    def rewrite(
        self,
        op: Any,
        query: ir.Value,
        latent: ir.Value,
        rope_key: ir.Value,
        w_kv_b: ir.Value,
        visible: ir.Value,
        key: ir.Value,
        out: ir.Value,
        **_: Any,
    ) -> Any:
        heads, nope, value, _rank = expansion_sizes(key, latent, w_kv_b)
        w_uk_HNL, w_uv_HLV = split_heads(op, w_kv_b, heads, nope, value)
        q_nope_BHSN, q_rope_BHSR = split_query(op, query, nope, static(rope_key, -1))
        scale = _scale(op, required_node(out))
        key_BHNT = op.MatMul(w_uk_HNL, swapped(op, latent))
        scores_BHST = op.Add(
            op.MatMul(op.Mul(q_nope_BHSN, scale), key_BHNT),
            op.MatMul(op.Mul(q_rope_BHSR, scale), swapped(op, rope_key)),
        )
        probabilities_BHST = op.Softmax(_masked(op, scores_BHST, visible), axis=-1)
        return op.MatMul(probabilities_BHST, op.MatMul(latent, w_uv_HLV))


class Cached:
    """What a CacheUpdate left in the cache, as it lies there (stale slots and all)."""

    def __init__(self, op: Any, update: ir.Node) -> None:
        self.rows_B1TW = as_fp32(op, update.outputs[0], required(update.inputs[0]))
        self.width = static(update.outputs[1], -1)
        self.filled_B1T1 = required(update.inputs[2])
        self.all_filled = required(update.inputs[3])

    def weighted(self, op: Any, probabilities_B1XT: ir.Value) -> ir.Value:
        """probabilities times rows, with stale rows cleared first when there are any."""
        plain = _branch("filled", [("MatMul", [probabilities_B1XT, self.rows_B1TW])])
        zero = ir.tensor(0.0, dtype=ir.DataType.FLOAT)
        cleared = _branch(
            "stale",
            [
                ("Constant", [], {"value": zero}),
                ("Where", [self.filled_B1T1, self.rows_B1TW, 0]),
                ("MatMul", [probabilities_B1XT, 1]),
            ],
        )
        return op.If(self.all_filled, then_branch=plain, else_branch=cleared)


def _branch(name: str, steps: list[Any]) -> ir.Graph:
    """A subgraph of single-output steps; an int operand is the result of that step."""
    nodes: list[ir.Node] = []
    for number, (op_type, operands, *attributes) in enumerate(steps):
        inputs = [nodes[o].outputs[0] if isinstance(o, int) else o for o in operands]
        node = ir.node(op_type, inputs, attributes=attributes[0] if attributes else None)
        node.outputs[0].name = f"{name}_{number}"
        nodes.append(node)
    return ir.Graph([], [nodes[-1].outputs[0]], nodes=nodes, name=name)


def _latent_attention(op: Any, *operands: Any) -> Any:
    return op.LatentAttention(
        *operands, _domain=DOMAIN, _outputs=["out"], _allow_other_attributes=True
    )


def _cache_update(rows: ir.Value, *, sliced: bool) -> ir.Node:
    """The CacheUpdate that `rows` comes from. Raises: Mismatch."""
    source = rows
    if sliced:
        node = producer(rows, "Slice")
        if node is None:
            raise Mismatch("not a slice of a cached row", rows)
        source = required(node.inputs[0])
    update = producer(source, "CacheUpdate", DOMAIN)
    if update is None:
        raise Mismatch("not the rows of a cache update", source)
    return update


def _slice_start(value: ir.Value) -> int:
    start = constant(required(required_node(value).inputs[1]))
    if start is None or start.size != 1:
        raise Mismatch("the slice is not along one axis", value)
    return int(start.item())


def _scale(op: Any, node: ir.Node) -> ir.Value:
    return op.Constant(value_float=float(attribute(node, "scale")))


def _rows(op: Any, x_BHSI: ir.Value) -> ir.Value:
    """[B, H, S, I] -> [B, 1, H*S, I]: the heads become rows of one product."""
    return op.Reshape(x_BHSI, op.Concat(ints(op, [0, 1, -1]), op.Shape(x_BHSI, start=3), axis=0))


def _heads(op: Any, x_B1XI: ir.Value, heads: int, width: int) -> ir.Value:
    """[B, 1, H*S, I] -> [B, H, S, I]."""
    return op.Reshape(x_B1XI, ints(op, [0, heads, -1, width]))


def _masked(op: Any, scores: ir.Value, visible: ir.Value) -> ir.Value:
    return op.Where(visible, scores, op.Constant(value_float=MASKED))


def _softmax(op: Any, scores_B1XT: ir.Value, visible: ir.Value, heads: int) -> ir.Value:
    """Masked softmax of folded rows; the mask is per new token, so heads unfold around it."""
    shape_BHST = op.Concat(ints(op, [0, heads, -1]), op.Shape(scores_B1XT, start=3), axis=0)
    scores_BHST = _masked(op, op.Reshape(scores_B1XT, shape_BHST), visible)
    return op.Reshape(op.Softmax(scores_BHST, axis=-1), op.Shape(scores_B1XT))


FUSED_ROW = LowerFusedRow.rule("lower_latent_attention")
SPLIT_ROWS = LowerSplitRows.rule("lower_latent_attention")
EXPANDED = LowerExpanded.rule("lower_expanded_attention")
