"""lower: expanded attention in blocks: the same numbers whatever the block, in less memory."""

from __future__ import annotations

import numpy as np
import pytest

from mla_deploy.rewrite import lower_blocked
from mla_deploy.rewrite.weights import collect_weights
from tests.rewrite.graphs import (
    LENGTHS,
    TOLERANCE,
    attention_feeds,
    attention_reference,
    attention_text,
    fired,
    op_types,
    parsed,
    run,
)
from tests.rewrite.test_lower_attention import STEPS
from tests.rewrite.test_lower_expanded import FORMS

_EXPAND = "Transpose MatMul MatMul Transpose MatMul Add MatMul"
_TURN = "ReduceMax Softmax MatMul ReduceMax Log Sub Max Sub Exp Sub Exp Add Div Mul Div Mul Add"


def test_fires() -> None:
    """All tokens in one block; or a loop over blocks, each expanded on its own."""
    after, count = fired(parsed(attention_text()), *lower_blocked.RULES)
    assert count == 1
    found = op_types(after)
    assert f"If[{_EXPAND} Where Softmax MatMul | Shape Squeeze Add Div" in found
    assert f"Loop[Mul Unsqueeze Add Slice Slice Slice {_EXPAND} Where {_TURN}" in found


@pytest.mark.parametrize("block", [1, 3, 8, 1024])
@pytest.mark.parametrize("name", FORMS)
def test_numbers(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graph and numpy float64 agree; the slots that were never written hold NaN."""
    monkeypatch.setattr(lower_blocked, "BLOCK", block)
    form = FORMS[name][0]
    after, _ = fired(parsed(attention_text(**form)), *lower_blocked.RULES)
    for lengths in (LENGTHS, STEPS["every slot is seen"], STEPS["from nothing"]):
        feeds = attention_feeds(lengths=lengths, seed=4, **form)
        found, reference = run(after, feeds), attention_reference(feeds, form.get("count", 0))
        valid = feeds["active"][:, 0, 0]
        # An idle row and padding see nothing; what they give is finite and read by nobody.
        assert np.isfinite(found["out"]).all()
        seen_BS = feeds["visible"][:, 0].any(-1) & valid[:, None]
        difference = np.abs(found["out"] - reference).max(axis=(1, 3))
        assert difference[seen_BS].max() < 2 * TOLERANCE["fp32"]


def test_scores_far_apart_over_many_blocks() -> None:
    """The running sum neither overflows nor vanishes."""
    after, _ = fired(parsed(attention_text()), *lower_blocked.RULES)
    feeds = attention_feeds(lengths=([2999], [1], 1, 3000), seed=6)
    feeds["query"] *= 30
    found, reference = run(after, feeds)["out"], attention_reference(feeds)
    assert np.abs(found - reference).max() < 1e-4


def test_a_loops_own_values_are_no_weights() -> None:
    after, _ = fired(parsed(attention_text()), *lower_blocked.RULES)
    given = {str(value.name) for value in after.graph.inputs} - {"w_kv_b"}
    assert list(collect_weights(after, given)) == ["w_kv_b.w_uk_HNL", "w_kv_b.w_uv_HLV"]
