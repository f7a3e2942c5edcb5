"""lower: attention over an expanded latent as plain products, heads apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mla_deploy.rewrite import absorb, lower_expanded
from tests.rewrite.graphs import (
    TOLERANCE,
    H,
    N,
    R,
    attention_feeds,
    attention_reference,
    attention_text,
    distance,
    fired,
    op_types,
    parsed,
    run,
)

_ROPED = "SplitHeads Split Transpose MatMul Mul MatMul Mul Transpose MatMul Add Where"
_SINKS = "Shape Concat Unsqueeze Expand Concat Softmax Slice"
FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "fused": ({}, f"CacheUpdate Slice Slice {_ROPED} Softmax"),
    "split": ({"split": True}, f"CacheUpdate CacheUpdate {_ROPED} Softmax"),
    "sinks": ({"sinks": True}, f"CacheUpdate Slice Slice {_ROPED} {_SINKS}"),
    # No product of no width, which a runtime may leave undone.
    "no rope": ({"rope": 0}, "CacheUpdate SplitHeads Transpose MatMul Mul MatMul Where Softmax"),
    "sparse": (
        {"count": 3}, f"CacheUpdate Slice Slice ChooseTokens SelectVisible {_ROPED} Softmax"
    ),
    "shared rows": ({"shared": True}, f"CacheRead Slice Slice {_ROPED} Softmax"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_fires(name: str) -> None:
    form, wanted = FORMS[name]
    after, count = fired(parsed(attention_text(**form)), *lower_expanded.RULES)
    assert (count, op_types(after)) == (1, f"{wanted} MatMul MatMul")


@pytest.mark.parametrize("growing", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", FORMS)
def test_numbers(name: str, dtype: str, growing: bool) -> None:
    """Before, after and numpy float64 agree; the slots that were never written hold NaN."""
    form = {**FORMS[name][0], "growing": growing}
    before = parsed(attention_text(dtype, **form))
    after, _ = fired(before, *lower_expanded.RULES)
    feeds = attention_feeds(dtype, **form)
    found, reference = run(after, feeds), attention_reference(feeds, form.get("count", 0))
    assert distance(found, run(before, feeds)) < TOLERANCE["fp32"]
    assert np.abs(found["out"] - reference).max() < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("float[27,8] w_kv_b", "float[28,8] w_kv_b"),
        ("(query, key, value, visible)", "(query, value, key, visible)"),
        ("=> (float", f"=> (float[batch,{H},total,{N + R}] key, float"),
        ("mla_deploy.Attention", "mine.Attention"),
        ("mla_deploy.ExpandLatent", "mine.ExpandLatent"),
    ],
)
def test_near_miss(old: str, new: str) -> None:
    assert old in attention_text()
    before = parsed(attention_text().replace(old, new))
    assert fired(before, *lower_expanded.RULES)[1] == 0


@pytest.mark.parametrize("sinks", [False, True])
def test_each_rule_leaves_the_other_form_alone(sinks: bool) -> None:
    before = parsed(attention_text(sinks=sinks))
    assert fired(before, lower_expanded.RULES[not sinks])[1] == 0


@pytest.mark.parametrize("sinks", [False, True])
def test_an_absorbed_graph_is_not_expanded_again(sinks: bool) -> None:
    absorbed, _ = fired(parsed(attention_text(sinks=sinks)), *absorb.RULES)
    assert fired(absorbed, *lower_expanded.RULES)[1] == 0
