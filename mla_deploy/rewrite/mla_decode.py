"""MlaDecode: cache update and absorbed attention as the one operator that the plugin runs.

    # before:  CacheUpdate(cache_B1ME, new_row, plan) -> cache_out, rows
    #          LatentAttention(q_latent, q_rope, rows[..., :L], rows[..., L:], visible) -> out_BHSL
    # after:   MlaDecode(query_BSHE, new_row_BSE, cache_B1ME, cache_lengths_B, new_lengths_B)
    #              -> out_BSHL, cache_out

The operator is a model-local function (`mla_decode_body.py`), which any runtime can run, and the
node names a plugin beside it: TensorRT takes the plugin where it may override functions (10.15 and
later), or where the function is left out (before). `plugins/mla_decode/README.md` has its contract.

The two lengths are read off the plan: an active row writes its first new token at its length.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mla_deploy.rewrite.rule import (
    DOMAIN,
    Mismatch,
    Rule,
    as_fp32,
    attribute,
    constant,
    ints,
    required_dtype,
    required_node,
    static,
)

PLUGIN_NAMESPACE, PLUGIN_VERSION = DOMAIN, "1"
MOST_LATENT, MOST_ROW = 512, 576
# Vendors' figures for the part that `targets.py` names.
MULTIPROCESSORS = {
    "8.0": 108, "8.6": 82, "8.7": 16, "8.9": 128, "9.0": 132, "10.0": 148, "11.0": 20, "12.0": 170,
    "12.1": 48,
}  # fmt: skip
_TWO_BLOCKS = ("9.0", "10.0", "11.0")  # 228 KiB of shared memory: a multiprocessor holds two


def blocks_of_a_wave(sm: str) -> int:
    """How many blocks of attention run at once on the device of compute capability `sm`."""
    return MULTIPROCESSORS[sm] * (2 if sm in _TWO_BLOCKS else 1)


class ToMlaDecode(Rule):
    """`multiprocessors`: blocks of a wave; `rope`: the row has a rope key behind the latent.

    For a cache that is updated in place, in one fused row. It comes before the lowerings of the
    cache and of attention. Other forms (sinks, a choice of tokens, a ring, a mask of the layer's
    own) do not match, and are lowered as before.
    """

    def __init__(self, name: str, multiprocessors: int, rope: bool) -> None:
        super().__init__(name)
        self.multiprocessors = multiprocessors
        self.rope = rope

    def pattern(
        self,
        op: Any,
        q_latent: Any,
        q_rope: Any,
        visible: Any,
        cache: Any,
        rows: Any,
        filled: Any,
        all_visible: Any,
        active: Any,
        source: Any,
        slot: Any,
    ) -> Any:
        cache_out, stored = op.CacheUpdate(
            cache,
            rows,
            filled,
            all_visible,
            active,
            source,
            slot,
            _domain=DOMAIN,
            _outputs=["cache_out", "stored"],
            _allow_other_attributes=True,
        )
        latent = op.Slice(stored, _allow_other_inputs=True, _outputs=["latent"])
        rope_key = op.Slice(stored, _allow_other_inputs=True, _outputs=["rope_key"])
        out = op.LatentAttention(
            q_latent,
            q_rope,
            latent if self.rope else stored,
            rope_key,
            visible,
            _domain=DOMAIN,
            _outputs=["out"],
            _allow_other_attributes=True,
        )
        # Attention first: that is where the new nodes go, and the query is made by then.
        return out, cache_out

    def check(
        self,
        context: Any,
        visible: ir.Value,
        cache: ir.Value,
        filled: ir.Value,
        stored: ir.Value,
        rope_key: ir.Value,
        latent: ir.Value | None = None,
        **_: Any,
    ) -> bool:
        if visible.producer() is not None:
            raise Mismatch("the mask is the layer's own, not the plan's", visible)
        if cache.shape is None or filled.shape is None or cache.shape[2] != filled.shape[2]:
            raise Mismatch("the cache grows", cache)
        rope, width = static(rope_key, -1), static(cache, -1)
        rank = width if latent is None else static(latent, -1)
        if rank + rope != width or self.rope != (rope > 0):
            raise Mismatch("the row is not [latent | rope key]", rope_key)
        if latent is not None and (_start(latent), _start(rope_key)) != (0, rank):
            raise Mismatch("the row is not [latent | rope key]", rope_key)
        if rank % 16 or rope % 16 or rank > MOST_LATENT or width > MOST_ROW:
            raise Mismatch("the plugin has no kernel for rows of this width", cache)
        return True

    def rewrite(
        self,
        op: Any,
        q_latent: ir.Value,
        q_rope: ir.Value,
        cache: ir.Value,
        rows: ir.Value,
        active: ir.Value,
        source: ir.Value,
        slot: ir.Value,
        rope_key: ir.Value,
        out: ir.Value,
        **_: Any,
    ) -> Any:
        rope = static(rope_key, -1)
        rank = static(cache, -1) - rope
        query_BHSE = op.Concat(q_latent, q_rope, axis=-1) if self.rope else q_latent
        query_BSHE = op.Transpose(query_BHSE, perm=[0, 2, 1, 3])
        cached_B, fresh_B = _lengths(op, active, source, slot)
        out_BSHL, cache_out = op.MlaDecode(
            _as_stored(op, query_BSHE, cache),
            _as_stored(op, op.Squeeze(rows, ints(op, [1])), cache),
            cache,
            cached_B,
            fresh_B,
            scale=float(attribute(required_node(out), "scale")),
            latent=rank,
            storage="plain",
            tile=rank,
            rope_tile=max(rope, 1),
            multiprocessors=self.multiprocessors,
            plugin_namespace=PLUGIN_NAMESPACE,
            plugin_version=PLUGIN_VERSION,
            _domain=DOMAIN,
            _version=1,
            _outputs=2,
        )
        out_BHSL = op.Transpose(as_fp32(op, out_BSHL, cache), perm=[0, 2, 1, 3])
        return out_BHSL, cache_out


def rules(multiprocessors: int) -> tuple[Any, ...]:
    """To MlaDecode: rows with a rope key, and rows without."""
    return tuple(ToMlaDecode.rule("to_mla_decode", multiprocessors, rope) for rope in (True, False))


def _as_stored(op: Any, value: ir.Value, cache: ir.Value) -> ir.Value:
    """The operator takes the query and the new rows in the cache's dtype."""
    dtype = required_dtype(cache)
    return value if dtype == ir.DataType.FLOAT else op.Cast(value, to=dtype)


def _lengths(
    op: Any, active: ir.Value, source: ir.Value, slot: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """cache_lengths_B and new_lengths_B. An idle row's first is its length, or 1 where that is 0:
    a body that writes padding writes behind it.
    """
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    first_B = op.Gather(op.Gather(slot, zero, axis=1), op.Constant(value_int=2), axis=1)
    active_B = op.Squeeze(active, ints(op, [1, 2]))
    # The plan has an idle row rewrite its last slot.
    cached_B = op.Add(first_B, op.Where(active_B, zero, one))
    newest_B11 = op.Slice(source, ints(op, [-1]), ints(op, [2**63 - 1]), ints(op, [1]))
    newest_B = op.Squeeze(newest_B11, ints(op, [1, 2]))
    return cached_B, op.Where(active_B, op.Add(newest_B, one), zero)


def _start(value: ir.Value) -> int:
    start = constant(required_node(value).inputs[1])
    if start is None or start.size != 1:
        raise Mismatch("the slice is not along one axis", value)
    return int(start.item())
