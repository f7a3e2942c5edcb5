"""A layer of routed experts with quantised weights in two forms, over one file of bytes.

    ours, If per expert   the product's MoE composite, lowered and quantised by its own rules
    contrib QMoE          com.microsoft `QMoE`, rows of gate and up interleaved as it asks

Both take hidden_XD and give out_XD; ours takes index_XK and weight_XK, QMoE the scores_XE that
these were made from. Weights are initializers: no other weights does ONNX Runtime pack.
"""

from __future__ import annotations

import onnx_ir as ir
from moe_codes import DOWN, GATE_UP, ExpertCodes
from moe_forms import Experts
from small_graphs import GraphBuilder, shaped, tidied

from mla_deploy.rewrite import lower_experts, order, quantize_cpu
from mla_deploy.rewrite.rule import DOMAIN
from mla_deploy.rewrite.weights import collect_weights
from mla_deploy.weight_forms.form import WeightPlan
from mla_deploy.weight_forms.parts import part_names

_INTEGER_PRODUCTS = 4  # ours has the same accuracy level


def ours(e: Experts, codes: ExpertCodes) -> ir.Model:
    g = GraphBuilder()
    hidden = g.input("hidden", "float32", "tokens", e.hidden)
    index = g.input("index", "int64", "tokens", e.chosen)
    weight = g.input("weight", "float32", "tokens", e.chosen)
    gate_up = g.input(GATE_UP, "float32", e.count, 2 * e.inner, e.hidden)
    down = g.input(DOWN, "float32", e.count, e.hidden, e.inner)
    out = g.op(
        "MoE", hidden, index, weight, gate_up, down, domain=DOMAIN, activation="silu", limit=0.0,
        identity=0,
    )  # fmt: skip
    model = g.model(out=shaped(out, "tokens", e.hidden))
    plan = WeightPlan({"experts": codes.form}, codes.form.spelling)
    order.apply_rules(model, [lower_experts.RULE, *quantize_cpu.expert_rules(plan, 0)])
    collect_weights(model, {"hidden", "index", "weight"})
    order.require_lowered(model)
    return codes.bound(tidied(model))


def contrib(e: Experts, codes: ExpertCodes) -> ir.Model:
    """It picks the experts itself."""
    g = GraphBuilder()
    hidden = g.input("hidden", "float32", "tokens", e.hidden)
    scores = g.input("scores", "float32", "tokens", e.count)
    gate_up, gate_up_scales, *gate_up_zeros = _parts(g, GATE_UP, codes)
    down, down_scales, *down_zeros = _parts(g, DOWN, codes)
    no_third = [None] * 3  # gate and up are one matrix
    out = g.op(
        "QMoE", hidden, scores, gate_up, gate_up_scales, None, down, down_scales, None,
        *no_third, *gate_up_zeros, *down_zeros, domain="com.microsoft", k=e.chosen,
        activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0,
        normalize_routing_weights=1, expert_weight_bits=codes.form.bits,
        block_size=codes.form.block, accuracy_level=_INTEGER_PRODUCTS,
    )  # fmt: skip
    return codes.bound(g.model(out=shaped(out, "tokens", e.hidden)))


FORMS = {"ours, If per expert": ours, "contrib QMoE": contrib}


def _parts(g: GraphBuilder, stack: str, codes: ExpertCodes) -> list[ir.Value]:
    """values_ERC, scales_ERB and, where there are some, zero_points_ERP of one stack."""
    found = []
    for name in (f"{stack}.{part}" for part in part_names(codes.form)):
        held = codes.tensors[name]
        found.append(ir.Value(name=name, shape=held.shape, type=ir.TensorType(held.dtype)))
    g.inputs += found
    return found
