"""One layer's attention as the product lowers it: a query and one new cache row in, the heads'
values out. Composites go through the product's own rules, decode or prefill; what they are
compared with is in `attention_rivals.py`. All read kv_b_proj (or its two halves) once per step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from small_graphs import GraphBuilder, shaped, tidied

from mla_deploy.rewrite import order
from mla_deploy.rewrite.rule import DOMAIN
from mla_deploy.rewrite.weights import collect_weights

LATENT_IN_PLACE = {"cache_out": "cache"}


@dataclass(frozen=True)
class Sizes:
    """Heads and widths of the layer."""

    heads: int
    nope: int
    rope: int
    value: int
    rank: int

    @staticmethod
    def of(fields: Mapping[str, Any]) -> Sizes:
        """The sizes in a config."""
        nope, rope, value = (fields[f"{k}_head_dim"] for k in ("qk_nope", "qk_rope", "v"))
        return Sizes(fields["num_attention_heads"], nope, rope, value, fields["kv_lora_rank"])

    @property
    def scale(self) -> float:
        return float((self.nope + self.rope) ** -0.5)


def from_rules(sizes: Sizes, *, absorbed: bool) -> ir.Model:
    """The product's graph of either kind; its weights become inputs."""
    g, s = GraphBuilder(), sizes
    query, cache, rows = latent_inputs(g, s)
    bool_T = (
        ("filled", "bool", 1, 1, "total", 1),
        ("all_visible", "bool"),
        ("active", "bool", 1, 1, 1),
    )
    filled, all_visible, active = (g.input(name, kind, *shape) for name, kind, *shape in bool_T)
    source, slot = g.input("source", "int64", 1, 1, 1), g.input("slot", "int64", 1, 1, 3)
    visible = g.input("visible", "bool", 1, 1, 1, "total")
    w_kv_b = g.input("w_kv_b", "float32", s.heads * (s.nope + s.value), s.rank)
    plan = (filled, all_visible, active, source, slot)
    cache_out, held = g.ops("CacheUpdate", 2, cache, rows, *plan, domain=DOMAIN, cleared=1)
    shaped(cache_out, 1, 1, "total", s.rank + s.rope)
    shaped(held, 1, 1, "total", s.rank + s.rope)
    latent, rope_key = halves(g, held, s)
    key, value = g.ops(
        "ExpandLatent", 2, latent, rope_key, w_kv_b, domain=DOMAIN,
        heads=s.heads, nope=s.nope, value=s.value,
    )  # fmt: skip
    shaped(key, 1, s.heads, "total", s.nope + s.rope)
    shaped(value, 1, s.heads, "total", s.value)
    out = g.op("Attention", query, key, value, visible, domain=DOMAIN, scale=s.scale)
    shaped(out, 1, s.heads, 1, s.value)
    model = g.model(out=out, cache_out=cache_out)
    rules = order.decode_cpu if absorbed else order.prefill_cpu
    order.apply_rules(model, rules(growing=False))
    collect_weights(model, {value.name or "" for value in g.inputs} - {"w_kv_b"})
    order.require_lowered(model)
    return tidied(model)


def latent_inputs(g: GraphBuilder, s: Sizes) -> tuple[ir.Value, ir.Value, ir.Value]:
    """query, cache and the new row."""
    return (
        g.input("query", "float32", 1, s.heads, 1, s.nope + s.rope),
        g.input("cache", "float32", 1, 1, "total", s.rank + s.rope),
        g.input("rows", "float32", 1, 1, 1, s.rank + s.rope),
    )


def halves(g: GraphBuilder, rows: ir.Value, s: Sizes) -> tuple[ir.Value, ir.Value]:
    """latent [..., L] and rope key [..., R] of cached rows."""
    spans = ((0, s.rank), (s.rank, s.rank + s.rope))
    latent, rope_key = (
        g.op("Slice", rows, g.ints(start), g.ints(end), g.ints(3)) for start, end in spans
    )
    return shaped(latent, 1, 1, "total", s.rank), shaped(rope_key, 1, 1, "total", s.rope)
