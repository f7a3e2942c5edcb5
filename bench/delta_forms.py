"""A layer's delta recurrence and its convolution, in the forms that `delta.py` compares.

ours                  the product's composite through its own lowering
plain body            the composite as any runtime runs it: a Scan over tokens; a Conv
chunked               16 tokens at a time: delta_chunked.py
CausalConvWithState   com.microsoft, channels first; it does not know rows of several lengths
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from small_graphs import GraphBuilder, tidied

from mla_deploy.rewrite import composites, lower_conv, lower_delta, order
from mla_deploy.rewrite.rule import DOMAIN


@dataclass(frozen=True)
class Linear:
    """Heads, the width of a key and of a value, and taps of the convolution before them."""

    heads: int
    width: int
    wide: int
    taps: int

    @property
    def channels(self) -> int:
        return self.heads * (2 * self.width + self.wide)


def delta_inputs(g: GraphBuilder, s: Linear) -> list[ir.Value]:
    """query, key, value, decay, beta, state, valid."""
    token = ("batch", "new", s.heads)
    return [
        g.input("query", "float32", *token, s.width), g.input("key", "float32", *token, s.width),
        g.input("value", "float32", *token, s.wide), g.input("decay", "float32", *token, s.width),
        g.input("beta", "float32", *token),
        g.input("state", "float32", "batch", s.heads, s.width, s.wide),
        g.input("valid", "bool", "batch", "new"),
    ]  # fmt: skip


def delta(s: Linear, *, lowered: bool) -> ir.Model:
    g = GraphBuilder()
    out, state_out = g.ops(
        "DeltaAttention", 2, *delta_inputs(g, s), domain=DOMAIN, normalize=1
    )  # fmt: skip
    return _finished(g.model(out=out, state_out=state_out), lowered)


def conv(s: Linear, *, lowered: bool) -> ir.Model:
    g = GraphBuilder()
    mixed, state, weight, lengths = _conv_inputs(g, s)
    out, state_out = g.ops(
        "ConvState", 2, mixed, state, weight, lengths, domain=DOMAIN, channels=s.channels,
        activation="silu",
    )  # fmt: skip
    return _finished(g.model(out=out, state_out=state_out), lowered)


def contrib_conv(s: Linear) -> ir.Model:
    """Rows and state channels first, as it wants them; its input and output are turned."""
    g = GraphBuilder()
    mixed, state, weight, _ = _conv_inputs(g, s)
    turned = [g.op("Transpose", x, perm=[0, 2, 1]) for x in (mixed, state)]
    out, state_out = g.ops(
        "CausalConvWithState", 2, turned[0], weight, None, turned[1], domain="com.microsoft",
        activation="silu",
    )  # fmt: skip
    ends = [g.op("Transpose", x, perm=[0, 2, 1]) for x in (out, state_out)]
    return g.model(out=ends[0], state_out=ends[1])


def feeds(s: Linear, batch: int, new: int) -> dict[str, np.ndarray]:
    """Random tokens, all valid, for the recurrence and the convolution."""
    rng = np.random.default_rng(0)
    shapes = {
        "query": (batch, new, s.heads, s.width), "key": (batch, new, s.heads, s.width),
        "value": (batch, new, s.heads, s.wide), "decay": (batch, new, s.heads, s.width),
        "beta": (batch, new, s.heads), "state": (batch, s.heads, s.width, s.wide),
        "mixed": (batch, new, s.channels), "rows": (batch, s.taps - 1, s.channels),
        "weight": (s.channels, 1, s.taps),
    }  # fmt: skip
    made = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}
    made["decay"] = -8 * np.log1p(np.exp(made["decay"]))
    made["beta"] = 1 / (1 + np.exp(-made["beta"]))
    lengths = np.full(batch, new, np.int64)
    return {**made, "valid": np.ones((batch, new), bool), "new_lengths": lengths}


def _conv_inputs(g: GraphBuilder, s: Linear) -> tuple[ir.Value, ...]:
    return (
        g.input("mixed", "float32", "batch", "new", s.channels),
        g.input("rows", "float32", "batch", s.taps - 1, s.channels),
        g.input("weight", "float32", s.channels, 1, s.taps),
        g.input("new_lengths", "int64", "batch"),
    )


def _finished(model: ir.Model, lowered: bool) -> ir.Model:
    if lowered:
        order.apply_rules(model, [lower_delta.RULE, *lower_conv.RULES])
        order.require_lowered(model)
    else:
        composites.add_bodies(model)
    return tidied(model)
