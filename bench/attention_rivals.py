"""What the absorbed attention is compared with, over the same interface as `attention_graphs.py`.

re-expanding        what transformers does at every step: kv_b_proj over the whole latent cache
Attention, concat   ONNX `Attention` with past and present keys and values, heads expanded
Attention, in place ONNX `Attention` over an expanded cache that is written in place
"""

from __future__ import annotations

import onnx_ir as ir
from attention_graphs import Sizes, halves, latent_inputs
from small_graphs import GraphBuilder

EXPANDED_IN_PLACE = {"key_out": "key", "value_out": "value"}


def reexpanding(sizes: Sizes) -> ir.Model:
    """kv_b_proj over every cached latent, heads apart, the rope key repeated for each head."""
    g, s = GraphBuilder(), sizes
    query, cache, rows = latent_inputs(g, s)
    slot = g.input("slot", "int64", 1, 1, 3)
    cache_out = g.op("ScatterND", cache, slot, g.op("Squeeze", rows, g.ints(1)))
    key, value = _expanded(g, cache_out, s)
    scores = g.op("MatMul", query, g.op("Transpose", key, perm=[0, 1, 3, 2]))
    scores = g.op("Mul", scores, g.op("Constant", value_float=s.scale))
    out = g.op("MatMul", g.op("Softmax", scores, axis=-1), value)
    return g.model(out=out, cache_out=cache_out)


def standard_operator(sizes: Sizes, *, in_place: bool) -> ir.Model:
    """ONNX `Attention` over the expanded cache; the new row is expanded here."""
    g, s = GraphBuilder(), sizes
    query = g.input("query", "float32", 1, s.heads, 1, s.nope + s.rope)
    rows = g.input("rows", "float32", 1, 1, 1, s.rank + s.rope)
    new_key, new_value = _expanded(g, rows, s)
    past = "total" if in_place else "past"
    past_key = g.input("key", "float32", 1, s.heads, past, s.nope + s.rope)
    past_value = g.input("value", "float32", 1, s.heads, past, s.value)
    if not in_place:
        out, key, value = g.ops(
            "Attention", 3, query, new_key, new_value, None, past_key, past_value, scale=s.scale
        )
        return g.model(out=out, key_out=key, value_out=value)
    slots = g.input("slots", "int64", 1, s.heads, 1, 3)
    key = g.op("ScatterND", past_key, slots, new_key)
    value = g.op("ScatterND", past_value, slots, new_value)
    return g.model(
        out=g.op("Attention", query, key, value, scale=s.scale), key_out=key, value_out=value
    )


def _expanded(g: GraphBuilder, rows: ir.Value, s: Sizes) -> tuple[ir.Value, ir.Value]:
    """key [1, H, T, N+R] and value [1, H, T, V] of cached rows [1, 1, T, L+R]."""
    latent, rope_key = halves(g, rows, s)
    w_kv_b = g.input("w_kv_b", "float32", s.heads * (s.nope + s.value), s.rank)
    both = g.op("MatMul", latent, g.op("Transpose", w_kv_b, perm=[1, 0]))
    apart = g.op("Reshape", both, g.ints(1, -1, s.heads, s.nope + s.value))
    heads = g.op("Transpose", apart, perm=[0, 2, 1, 3])
    nope, value = g.ops("Split", 2, heads, g.ints(s.nope, s.value), axis=-1)
    shape = g.op("Concat", g.ints(1, s.heads), g.op("Shape", rope_key, start=2), axis=0)
    return g.op("Concat", nope, g.op("Expand", rope_key, shape), axis=-1), value
