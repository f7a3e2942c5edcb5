"""quantise: which products become MatMulNBits, which stay, and what numbers they read."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from mla_deploy.rewrite import (
    absorb,
    lower_attention,
    lower_blocked,
    lower_expanded,
    lower_experts,
    quantize_cpu,
    quantize_heads,
)
from mla_deploy.rewrite.order import apply_rules
from mla_deploy.rewrite.weights import collect_weights
from mla_deploy.weight_forms.form import parse_plan
from mla_deploy.weight_forms.parts import NBITS, Part, part_bytes, part_names
from mla_deploy.weight_forms.rounding import dequantized, quantized
from tests.rewrite.graphs import parsed
from tests.rewrite.widened_graph import widened_model

PLAN = parse_plan("int4")
_LINEAR = """
linear (float[2,5,64] x, float[40,64] weight) => (float[2,5,40] out) {
    turned = Transpose <perm = [1, 0]> (weight)
    out = MatMul (x, turned)
}
"""


def domain_ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph.all_nodes() if node.domain == "com.microsoft"]


def linear(text: str = _LINEAR, router_rows: int = 0, plan: str = "int4") -> tuple[ir.Model, int]:
    model = parsed(text)
    counts = apply_rules(model, quantize_cpu.linear_rules(parse_plan(plan), router_rows))
    return model, counts["quantize_linear"]


@pytest.mark.parametrize(("plan", "parts"), [("int4", 2), ("int8:asymmetric", 3)])
def test_a_linear_layer_fires(plan: str, parts: int) -> None:
    model, count = linear(plan=plan)
    assert (count, domain_ops(model)) == (1, ["MatMulNBits"])
    uses = collect_weights(model, {"x"})
    names = ["weight.values", "weight.scales", "weight.zero_points"][:parts]
    assert list(uses) == names
    assert {use.parameter for use in uses.values()} == {"weight"}
    assert [v.name for v in model.graph.inputs] == ["x", *names]


@pytest.mark.parametrize(
    ("text", "router_rows", "plan"),
    [
        (_LINEAR, 40, "int4"),  # a router
        (_LINEAR, 0, "int4:linear=keep"),
        (_LINEAR.replace("64", "12"), 0, "int4"),  # too few columns for a block
        (_LINEAR.replace("weight", "a.indexer.wk.weight").replace("a.indexer.wk.", "indexer_"), 0,
         "int4:linear=keep"),
        (_LINEAR.replace("float[40,64] weight)", "float[64,40] turned2)")
         .replace("Transpose <perm = [1, 0]> (weight)", "Identity (turned2)"), 0, "int4"),
    ],
    ids=["router", "kept", "narrow", "named", "no weight of rows"],
)  # fmt: skip
def test_what_must_not_fire(text: str, router_rows: int, plan: str) -> None:
    model, count = linear(text, router_rows, plan)
    assert (count, domain_ops(model)) == (0, [])


def test_experts_fire_inside_their_branches() -> None:
    text = """
experts (float[T,64] hidden, int64[T,2] index, float[T,2] weight,
         float[3,64,64] "mlp.experts.gate_up_proj", float[3,64,32] "mlp.experts.down_proj")
    => (float[T,64] out) {
    out = mla_deploy.MoE <activation: string = "silu", limit: float = 0.0, identity: int = 0> (
        hidden, index, weight, "mlp.experts.gate_up_proj", "mlp.experts.down_proj")
}
"""
    model = parsed(text)
    rules = (lower_experts.RULE, *quantize_cpu.expert_rules(PLAN, 0))
    assert apply_rules(model, rules)["quantize_linear"] == 9
    assert domain_ops(model) == ["MatMulNBits"] * 9
    uses = collect_weights(model, {"hidden", "index", "weight"})
    assert "mlp.experts.2.down_proj.weight.values" in uses
    assert len(uses) == 18
    inside = [node for node in model.graph if node.op_type == "MatMulNBits"]
    assert inside == []  # all in the branches: an expert that is not hit is not read


def test_an_embedding_and_its_tied_head_share_one_form() -> None:
    rules = quantize_cpu.trunk_rules(PLAN, 64, tied=True)
    text = """
trunk (int64[B,S] ids, float[96,64] embed, float[96,64] head) => (float[B,S,96] out) {
    x = Gather (embed, ids)
    turned = Transpose <perm = [1, 0]> (head)
    out = MatMul (x, turned)
}
"""
    model = parsed(text)
    counts = apply_rules(model, rules)
    assert (counts["quantize_linear"], counts["quantize_embedding"]) == (1, 1)
    uses = collect_weights(model, {"ids"})
    forms = {use.part.form for use in uses.values() if use.part}
    assert {form.spelling for form in forms} == {"int8:block=32"}
    shapes = {str(v.name): list(v.shape) for v in model.graph.inputs if v.shape is not None}
    assert shapes["embed.values"] == [96, 64]
    assert shapes["head.values"] == [96, 2, 32]


def test_an_embedding_of_a_width_that_no_block_divides_stays() -> None:
    assert len(quantize_cpu.trunk_rules(PLAN, 40, tied=False)) == 1
    assert len(quantize_cpu.trunk_rules(PLAN, 48, tied=False)) == 2


@pytest.mark.parametrize("plan", ["int4", "int4:asymmetric", "int8:block=32", "int8:asymmetric"])
def test_a_half_made_float_again_is_the_weight(plan: str) -> None:
    """What prefill reads of w_uk, written out for the whole of it."""

    form = parse_plan(plan).form("kv_b")
    assert form is not None
    weight = torch.randn(6, 72, generator=torch.Generator().manual_seed(1))
    parts = part_bytes(weight, Part("", form, NBITS))
    model = widened_model(form, 72, {n: tuple(p.shape) for n, p in parts.items()})
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    found = session.run(None, {name: parts[name].numpy() for name in part_names(form)})[0]
    wanted = dequantized(quantized(weight, form), form).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)


_ATTEND = """
attend (float[B,3,S,48] query, float[B,1,T,64] latent, float[B,1,T,16] rope_key,
        float[168,64] "a.kv_b_proj.weight", bool[B,1,S,T] visible) => (float[B,3,S,24] out) {
    key, value = mla_deploy.ExpandLatent <heads: int = 3, nope: int = 32, value: int = 24> (
        latent, rope_key, "a.kv_b_proj.weight")
    out = mla_deploy.Attention <scale: float = 0.5> (query, key, value, visible)
}
"""


def test_rules_of_both_graphs_take_the_halves() -> None:
    """Both name the same parts; nothing of kv_b_proj is read in float."""
    named = []
    for rules in (
        (*lower_expanded.RULES, *quantize_heads.expanded_rules(PLAN)),
        (*absorb.RULES, *lower_attention.RULES, *quantize_heads.absorbed_rules(PLAN)),
    ):
        model = parsed(_ATTEND)
        assert apply_rules(model, rules)["quantize_heads"] == 2
        uses = collect_weights(model, {"query", "latent", "rope_key", "visible"})
        named.append({name: use.part for name, use in uses.items()})
    assert named[0] == named[1]
    assert set(named[0]) == {
        f"a.kv_b_proj.{half}.{part}"
        for half in ("w_uk_HNL", "w_uv_HLV") for part in ("values", "scales")
    }  # fmt: skip


@pytest.mark.parametrize("plan", ["int4", "int4:block=64", "int4:block=128", "int8:asymmetric"])
def test_what_is_widened_in_a_loop_has_names_of_its_own(plan: str) -> None:
    """A session takes no name twice, in branches and loops either."""
    model = parsed(_ATTEND)
    form = parse_plan(plan)
    rules = (*lower_blocked.RULES, *quantize_heads.expanded_rules(form))
    assert apply_rules(model, rules)["quantize_heads"] > 0
    names = [value.name for node in model.graph.all_nodes() for value in node.outputs]
    assert sorted(set(names)) == sorted(names)
