"""The lists of rules as wholes: nothing of ours is left, numbers hold, counts are asserted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mla_deploy.errors import MlaDeployError
from mla_deploy.rewrite import absorb, lower_cache, order
from mla_deploy.rewrite.weights import WeightUse, collect_weights
from tests.rewrite.graphs import (
    TOLERANCE,
    Arrays,
    H,
    L,
    N,
    V,
    attention_feeds,
    attention_reference,
    attention_text,
    distance,
    experts_text,
    op_types,
    parsed,
    run,
)

GRAPHS = {"prefill": order.prefill_cpu, "decode": order.decode_cpu}
_OTHERS = {
    "query", "new_rows", "new_latent", "new_key", "cache0", "cache1", "visible", "filled",
    "all_visible", "active", "source", "slot", "sinks", "scores",
}  # fmt: skip


def halves(feeds: Arrays) -> Arrays:
    """w_kv_b cut by hand into what the lowered graphs read."""
    w_HKL = feeds["w_kv_b"].reshape(H, N + V, L)
    return {
        **feeds,
        "w_kv_b.w_uk_HNL": w_HKL[:, :N],
        "w_kv_b.w_uv_HLV": w_HKL[:, N:].transpose(0, 2, 1),
    }


# What a form adds to the counts of a plain one, and how often each rule fires.
FORMS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "plain": ({}, {"lower_cache_update": 1}),
    "split": ({"split": True}, {"lower_cache_update": 2}),
    "growing": ({"growing": True}, {"lower_cache_update": 1}),
    "split, growing": ({"split": True, "growing": True}, {"lower_cache_update": 2}),
    "sinks": ({"sinks": True}, {"lower_cache_update": 1}),
    "no rope": ({"rope": 0}, {"lower_cache_update": 1}),
    "sparse": ({"count": 3}, {"lower_cache_update": 1, "lower_choose_tokens": 1}),
    "sparse, sinks, split": (
        {"count": 3, "sinks": True, "split": True},
        {"lower_cache_update": 2, "lower_choose_tokens": 1},
    ),
    "shared rows": ({"shared": True}, {}),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention_from_trace_to_plain(dtype: str, graph: str, name: str) -> None:
    form, also = FORMS[name]
    before = parsed(attention_text(dtype, **form))
    after = before.clone()
    counts = order.apply_rules(after, GRAPHS[graph](bool(form.get("growing"))))
    uses = collect_weights(after, _OTHERS)
    order.require_lowered(after)
    assert {node.domain for node in after.graph} == {""}
    wanted = (
        also
        | {
            "prefill": {"lower_expanded_attention": 1},
            "decode": {"absorb_projections": 1, "lower_latent_attention": 1},
        }[graph]
    )
    if graph == "prefill" and form.get("count"):
        wanted["lower_select_visible"] = 1  # in decode the attention itself does it
    if graph == "prefill" and form.get("shared"):
        wanted["lower_cache_read"] = 1
    assert {rule: count for rule, count in counts.items() if count} == wanted
    order.require_counts(counts, wanted)
    assert uses == {
        f"w_kv_b.{half}": WeightUse("w_kv_b", half, H, N, V) for half in ("w_uk_HNL", "w_uv_HLV")
    }
    feeds = attention_feeds(dtype, **form)
    found, reference = run(after, halves(feeds)), attention_reference(feeds, form.get("count", 0))
    assert distance(found, run(before, feeds)) < TOLERANCE["fp32"]
    assert np.abs(found["out"] - reference).max() < TOLERANCE[dtype]


@pytest.mark.parametrize("graph", GRAPHS)
def test_experts_are_lowered_in_both(graph: str) -> None:
    model = parsed(experts_text())
    assert order.apply_rules(model, GRAPHS[graph](False))["lower_experts"] == 1
    collect_weights(model, {"hidden", "index", "weight"})
    order.require_lowered(model)


def test_every_rule_is_counted_even_at_zero() -> None:
    counts = order.apply_rules(parsed("g (float[n] x) => (float[n] y) { y = Relu (x) }"),
                               order.decode_cpu(False))  # fmt: skip
    assert counts == dict.fromkeys((
        "raise_rms_norm", "absorb_projections", "lower_latent_attention", "lower_cache_update",
        "lower_cache_read", "lower_quantized_update", "lower_quantized_read", "lower_ring_update",
        "lower_choose_tokens", "lower_select_visible",
        "lower_experts", "lower_delta_attention", "lower_conv_state", "lower_linear",
        "lower_rms_norm",
    ), 0)  # fmt: skip


def test_the_cache_is_lowered_after_what_reads_it() -> None:
    """The order that the comments in order.py insist on: the other way nothing matches."""
    model = parsed(attention_text())
    order.apply_rules(model, [*absorb.RULES, lower_cache.rule(False), *order.decode_cpu(False)])
    with pytest.raises(MlaDeployError, match="LatentAttention"):
        order.require_lowered(model)


@pytest.mark.parametrize("found", [{}, {"absorb_projections": 3}, {"absorb_projections": 5}])
def test_a_wrong_count_is_refused(found: dict[str, int]) -> None:
    with pytest.raises(MlaDeployError, match="absorb_projections fired") as caught:
        order.require_counts(found, {"absorb_projections": 4})
    assert caught.value.code == "REW-COUNT"
    assert caught.value.details["wanted"] == 4
    assert caught.value.details["fired"] == found.get("absorb_projections", 0)


def test_a_rule_that_may_not_fire_is_refused_when_it_does() -> None:
    with pytest.raises(MlaDeployError, match="REW-COUNT"):
        order.require_counts({"lower_experts": 1}, {"lower_experts": 0})
    order.require_counts({"lower_experts": 0, "other": 2}, {"lower_experts": 0})


@pytest.mark.parametrize("text", [attention_text(), experts_text()])
def test_what_no_rule_lowered_is_refused(text: str) -> None:
    model = parsed(text)
    with pytest.raises(MlaDeployError) as caught:
        order.require_lowered(model)
    assert caught.value.code == "REW-LEFT"
    assert set(caught.value.details["composites"]) <= set(op_types(model).split())


def test_a_composite_inside_a_branch_is_found() -> None:
    model = parsed("""g (bool c, float[n,7] x, float[7] w) => (float[n,7] out) {
        out = If (c) <then_branch = t () => (y) { y = Relu (x) },
                      else_branch = f () => (z) {
                          z = mla_deploy.RmsNorm <epsilon: float = 0.1> (x, w) }> }""")
    with pytest.raises(MlaDeployError, match="RmsNorm"):
        order.require_lowered(model)
