"""A layer of routed experts in four forms, over the same weights and the same choice of experts.

    ours, If per expert   the product's MoE composite through its own lowering
    contrib MoE           com.microsoft `MoE`, rows of gate and up interleaved as it asks
    gathered weights      Gather of the chosen experts' weights, batched MatMul
    all experts           every expert for every token, weighted by zero where not chosen

All take hidden_XD, index_XK, weight_XK and give out_XD, with silu(gate) * up inside.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from small_graphs import GraphBuilder, shaped, tidied

from mla_deploy.rewrite import lower_experts, order
from mla_deploy.rewrite.rule import DOMAIN
from mla_deploy.rewrite.weights import collect_weights

STACK = "experts"


@dataclass(frozen=True)
class Experts:
    """How many, how many per token, and their widths."""

    count: int
    chosen: int
    hidden: int
    inner: int

    @property
    def bytes_each(self) -> int:
        return 3 * self.hidden * self.inner * 4


def ours(e: Experts) -> ir.Model:
    g = GraphBuilder()
    hidden, index, weight = _inputs(g, e)
    gate_up, down = _stacks(g, e)
    out = g.op(
        "MoE",
        hidden,
        index,
        weight,
        gate_up,
        down,
        domain=DOMAIN,
        activation="silu",
        limit=0.0,
        identity=0,
    )
    model = g.model(out=shaped(out, "tokens", e.hidden))
    order.apply_rules(model, [lower_experts.RULE])
    collect_weights(model, {"hidden", "index", "weight"})
    order.require_lowered(model)
    return tidied(model)


def contrib(e: Experts) -> ir.Model:
    """It picks the experts itself: it gets the scores that our choice was made from."""
    g = GraphBuilder()
    hidden = g.input("hidden", "float32", "tokens", e.hidden)
    scores = g.input("scores", "float32", "tokens", e.count)
    gate_up, down = _stacks(g, e, "interleaved")
    out = g.op(
        "MoE", hidden, scores, gate_up, None, down, domain="com.microsoft", k=e.chosen,
        activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0,
        normalize_routing_weights=1,
    )  # fmt: skip
    return g.model(out=shaped(out, "tokens", e.hidden))


def gathered(e: Experts) -> ir.Model:
    g = GraphBuilder()
    hidden, index, weight = _inputs(g, e)
    gate_up, down = _stacks(g, e)
    x_X11D1 = g.op("Unsqueeze", hidden, g.ints(1, 3))
    both_XKJ1 = g.op("MatMul", g.op("Gather", gate_up, index), x_X11D1)
    inner_XKI1 = _gated(g, both_XKJ1, e, axis=2)
    out_XKD1 = g.op("MatMul", g.op("Gather", down, index), inner_XKI1)
    weighted = g.op(
        "Mul", g.op("Squeeze", out_XKD1, g.ints(3)), g.op("Unsqueeze", weight, g.ints(2))
    )
    return g.model(out=g.op("ReduceSum", weighted, g.ints(1), keepdims=0))


def every(e: Experts) -> ir.Model:
    g = GraphBuilder()
    hidden, index, weight = _inputs(g, e)
    gate_up, down = _stacks(g, e)
    both_EXJ = g.op("MatMul", g.op("Unsqueeze", hidden, g.ints(0)), _turned(g, gate_up))
    out_EXD = g.op("MatMul", _gated(g, both_EXJ, e, axis=2), _turned(g, down))
    shape = g.op("Concat", g.op("Shape", index, end=1), g.ints(e.count), axis=0)
    none_XE = g.op("Expand", g.op("Constant", value_float=0.0), shape)
    dense_XE = g.op("ScatterElements", none_XE, index, weight, axis=1)
    dense_EX1 = g.op("Unsqueeze", g.op("Transpose", dense_XE, perm=[1, 0]), g.ints(2))
    return g.model(out=g.op("ReduceSum", g.op("Mul", out_EXD, dense_EX1), g.ints(0), keepdims=0))


FORMS = {"ours, If per expert": ours, "contrib MoE": contrib, "gathered weights": gathered,
         "all experts": every}  # fmt: skip


def _inputs(g: GraphBuilder, e: Experts) -> tuple[ir.Value, ir.Value, ir.Value]:
    return (
        g.input("hidden", "float32", "tokens", e.hidden),
        g.input("index", "int64", "tokens", e.chosen),
        g.input("weight", "float32", "tokens", e.chosen),
    )


def _stacks(
    g: GraphBuilder, e: Experts, gate_up: str = f"{STACK}.gate_up_proj"
) -> tuple[ir.Value, ir.Value]:
    """gate_up_EJD (J = 2 I) and down_EDI."""
    return (
        g.input(gate_up, "float32", e.count, 2 * e.inner, e.hidden),
        g.input(f"{STACK}.down_proj", "float32", e.count, e.hidden, e.inner),
    )


def _gated(g: GraphBuilder, both: ir.Value, e: Experts, axis: int) -> ir.Value:
    gate, up = g.ops("Split", 2, both, g.ints(e.inner, e.inner), axis=axis)
    return g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)


def _turned(g: GraphBuilder, stack: ir.Value) -> ir.Value:
    return g.op("Transpose", stack, perm=[0, 2, 1])
