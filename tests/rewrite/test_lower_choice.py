"""lower: the best tokens by TopK, and the mask that they make, against sorting in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mla_deploy.rewrite import lower_choice, lower_choice_trt
from tests.rewrite.graphs import Arrays, fired, op_types, parsed, plan, run

CHOOSE = """g (float[batch,new,total] scores) => (int64[batch,new,k] chosen) {{
    chosen = mla_deploy.ChooseTokens <count: int = {count}> (scores) }}"""
SELECT = """g (bool[batch,1,new,total] visible, {kind}[batch,new,k] chosen)
    => (bool[batch,1,new,total] selected) {{
    selected = mla_deploy.SelectVisible (visible, chosen) }}"""
BOTH = """g (bool[batch,1,new,total] visible, float[batch,new,total] scores)
    => (bool[batch,1,new,total] selected) {{
    chosen = mla_deploy.ChooseTokens <count: int = {count}> (scores)
    selected = mla_deploy.SelectVisible (visible, chosen) }}"""
_EVERY = "Shape Squeeze Shape Squeeze LessOrEqual Cast ReduceMin GreaterOrEqual And"
_SOME = (
    "Squeeze Shape Expand Cast ReduceMax GreaterOrEqual Where GreaterOrEqual ScatterElements "
    "Unsqueeze And"
)
_SELECTED = f"Cast {_EVERY} If[Identity | {_SOME}]"
COUNT = 3


def best(scores: NDArray[Any], count: int) -> NDArray[Any]:
    """Positions of the best scores in order of position."""
    return np.sort(np.argsort(-scores, axis=-1)[..., :count], axis=-1)


def test_choice_fires() -> None:
    after, count = fired(parsed(CHOOSE.format(count=COUNT)), lower_choice.CHOOSE)
    assert (count, op_types(after)) == (1, "Shape Min TopK")


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 9])
def test_choice(tokens: int) -> None:
    """Fewer tokens than asked for, as many, and more; the order of the chosen is nobody's."""
    scores = np.random.default_rng(tokens).standard_normal((2, 5, tokens)).astype(np.float32)
    before = parsed(CHOOSE.format(count=COUNT))
    after, _ = fired(before, lower_choice.CHOOSE)
    for model in (before, after):
        found = run(model, {"scores": scores})["chosen"]
        assert found.dtype == np.int64
        np.testing.assert_array_equal(np.sort(found, axis=-1), best(scores, COUNT))


@pytest.mark.parametrize("kind", ["int64", "int32"])
def test_mask_fires(kind: str) -> None:
    after, count = fired(parsed(SELECT.format(kind=kind)), lower_choice.SELECT)
    assert (count, op_types(after)) == (1, _SELECTED)


BOTH_RULES = pytest.mark.parametrize(
    "rule", [lower_choice.SELECT, lower_choice_trt.SELECT], ids=["cpu", "tensorrt"]
)


@BOTH_RULES
@pytest.mark.parametrize("kind", ["int64", "int32"])
@pytest.mark.parametrize("tokens", [2, 3, 4, 9])
def test_mask(tokens: int, kind: str, rule: Any) -> None:
    """Chosen tokens may be invisible, and then stay so; a pooled indexer gives int32."""
    random = np.random.default_rng(tokens)
    visible = random.random((2, 1, 5, tokens)) < 0.6
    count = min(COUNT, tokens)
    chosen = np.argsort(random.random((2, 5, tokens)), axis=-1)[..., :count]
    before = parsed(SELECT.format(kind=kind))
    after, _ = fired(before, rule)
    wanted = np.zeros_like(visible)
    for b, s in np.ndindex(2, 5):
        for t in chosen[b, s]:
            wanted[b, 0, s, t] = visible[b, 0, s, t]
    for model in (before, after):
        found = run(model, {"visible": visible, "chosen": chosen.astype(kind)})["selected"]
        np.testing.assert_array_equal(found, wanted)


@BOTH_RULES
def test_a_token_chosen_twice_is_chosen(rule: Any) -> None:
    after, _ = fired(parsed(SELECT.format(kind="int64")), rule)
    feeds = {"visible": np.ones((1, 1, 1, 5), bool), "chosen": np.array([[[4, 4, 1]]])}
    np.testing.assert_array_equal(
        run(after, feeds)["selected"][0, 0, 0], [False, True, False, False, True]
    )


@BOTH_RULES
@pytest.mark.parametrize(
    "chosen",
    [
        [[0, -1, -1], [-1, 2, 1]],  # none is written as -1, which is not the last token
        [[4, -1, -1], [-1, 4, -1]],  # the last one, beside none
        [[-1, -1, -1], [3, -1, 4]],  # nothing at all
        [[0, 1, -1, -1, -1, -1, -1], [4, 2, 0, 1, -1, -1, -1]],  # more places than tokens
        [[-1] * 5, [4, 3, 2, 1, 0]],  # as many
    ],
)
def test_none_is_chosen_by_minus_one(chosen: list[list[int]], rule: Any) -> None:
    visible = np.ones((1, 1, 2, 5), bool)
    wanted = np.array([[t in places for t in range(5)] for places in chosen])
    before = parsed(SELECT.format(kind="int32"))
    after, _ = fired(before, rule)
    for model in (before, after):
        found = run(model, {"visible": visible, "chosen": np.array([chosen], np.int32)})
        np.testing.assert_array_equal(found["selected"][0, 0], wanted)


def feeds_of(cached: list[int], new: list[int], width: int, rows: int) -> Arrays:
    visible = plan(cached, new, width, rows)["visible"]
    scores = np.random.default_rng(rows).standard_normal(visible[:, 0].shape).astype(np.float32)
    return {"visible": visible, "scores": np.where(visible[:, 0], scores, np.float32(-1e30))}


@pytest.mark.parametrize(
    ("cached", "new", "width", "rows"),
    [
        ([0, 0], [2, 1], 2, 2),
        ([0, 1], [3, 2], 3, 3),
        ([1, 5, 2], [2, 3, 0], 3, 8),
        ([7, 2], [1, 1], 1, 8),
    ],
)
def test_the_best_of_what_is_visible(
    cached: list[int], new: list[int], width: int, rows: int
) -> None:
    before = parsed(BOTH.format(count=COUNT))
    after, count = fired(before, lower_choice.CHOOSE, lower_choice.SELECT)
    assert (count, op_types(after)) == (2, f"Shape Min TopK {_SELECTED}")
    feeds = feeds_of(cached, new, width, rows)
    wanted = np.zeros_like(feeds["visible"])
    for b, s in np.ndindex(len(cached), width):
        seen = np.flatnonzero(feeds["visible"][b, 0, s])
        wanted[b, 0, s, seen[best(feeds["scores"][b, s, seen], COUNT)]] = True
    for model in (before, after):
        np.testing.assert_array_equal(run(model, feeds)["selected"], wanted)


@pytest.mark.parametrize(
    ("text", "old", "new"),
    [
        (CHOOSE.format(count=COUNT), "mla_deploy", "mine"),
        (SELECT.format(kind="int64"), "mla_deploy", "mine"),
        (SELECT.format(kind="int64"), "(visible, chosen)", "(visible)"),
        (SELECT.format(kind="int64"), "SelectVisible", "ChooseVisible"),
    ],
)
def test_near_miss(text: str, old: str, new: str) -> None:
    assert old in text
    before = parsed(text.replace(old, new))
    after, count = fired(before, lower_choice.CHOOSE, lower_choice.SELECT)
    assert (count, op_types(after)) == (0, op_types(before))
