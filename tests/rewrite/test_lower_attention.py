"""lower: attention over the latent as plain products, over any cache layout, whatever is stale."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mla_deploy.rewrite import absorb, lower_attention, lower_choice
from tests.rewrite.graphs import (
    LENGTHS,
    TOLERANCE,
    H,
    L,
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
from tests.rewrite.test_absorb import _PRODUCT
from tests.rewrite.test_lower_choice import _EVERY, _SOME

_FOLD = "Mul Reshape"  # scaled, then heads folded into rows
_SHAPES = "Shape Concat Shape Concat"  # how scores unfold and fold again
_SCORES = "Transpose MatMul Transpose"
_TWO_SCORES = f"{_SCORES} {_SCORES} Add"
_READ = "Transpose Transpose MatMul Transpose"  # rows^T weights^T
_MASK = "Reshape Where Reshape"
_SINKS = "Shape Unsqueeze Concat Expand Reshape Concat Expand Concat Softmax Slice"


def dense(softmax: str = "Softmax") -> str:
    """Nothing masked, or masked and cleared."""
    return f"If[{softmax} {_READ} | {_MASK} {softmax} Where {_READ}]"


def sparse(taken: str, scores: str, cut: str, softmax: str = "Softmax") -> str:
    """The chosen rows alone; or the choice as a mask, a no-op where every token is chosen."""
    rest = f"And Cast {_EVERY} If[Identity | {_SOME}]"
    few = "Cast Transpose Unsqueeze GreaterOrEqual GatherElements And Transpose "
    few += f"{taken} {scores} Where {softmax} "
    return (
        f"{_EVERY} Shape Squeeze Equal Not And If[{few}MatMul {cut}Reshape | "
        f"{rest} {scores} {dense(softmax)} {cut}Reshape]"
    )


_TAKEN = "Squeeze GatherND Unsqueeze Where"
_QUERY = f"SplitHeads Split {_PRODUCT}"
_CHOSEN = "ChooseTokens "
# What a form looks like behind the update of its caches.
FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "fused": ({}, f"{_QUERY} Concat {_FOLD} {_SHAPES} {_SCORES} {dense()} Slice Reshape"),
    "split": (
        {"split": True}, f"{_QUERY} {_FOLD} {_FOLD} {_SHAPES} {_TWO_SCORES} {dense()} Reshape"
    ),
    "no rope": (
        {"rope": 0}, f"SplitHeads {_PRODUCT} {_FOLD} {_SHAPES} {_SCORES} {dense()} Slice Reshape"
    ),
    "fused, sinks": (
        {"sinks": True},
        f"{_QUERY} Concat {_FOLD} {_SHAPES} Shape {_SCORES} {dense(_SINKS)} Slice Reshape",
    ),
    "split, sinks": (
        {"sinks": True, "split": True},
        f"{_QUERY} {_FOLD} {_FOLD} {_SHAPES} Shape {_TWO_SCORES} {dense(_SINKS)} Reshape",
    ),
    "sparse": (
        {"count": 3},
        f"{_CHOSEN}{_QUERY} Concat {_FOLD} {_SHAPES} {sparse(_TAKEN, _SCORES, 'Slice ')}",
    ),
    "sparse, split, sinks": (
        {"count": 3, "split": True, "sinks": True},
        f"{_CHOSEN}{_QUERY} {_FOLD} {_FOLD} {_SHAPES} Shape "
        + sparse(f"{_TAKEN} {_TAKEN}", _TWO_SCORES, "", _SINKS),
    ),
    "sparse, no rope": (
        {"count": 3, "rope": 0},
        f"{_CHOSEN}SplitHeads {_PRODUCT} {_FOLD} {_SHAPES} {sparse(_TAKEN, _SCORES, 'Slice ')}",
    ),
    "shared rows": (
        {"shared": True}, f"{_QUERY} Concat {_FOLD} {_SHAPES} {_SCORES} {dense()} Slice Reshape"
    ),
    "shared rows, split": (
        {"shared": True, "split": True},
        f"{_QUERY} {_FOLD} {_FOLD} {_SHAPES} {_TWO_SCORES} {dense()} Reshape",
    ),
    "shared rows, no rope, sparse": (
        {"shared": True, "rope": 0, "count": 3},
        f"{_CHOSEN}SplitHeads {_PRODUCT} {_FOLD} {_SHAPES} {sparse(_TAKEN, _SCORES, 'Slice ')}",
    ),
}  # fmt: skip


def absorbed(text: str) -> ir.Model:
    model, count = fired(parsed(text), *absorb.RULES)
    assert count == 1
    return model


def caches_of(form: dict[str, Any]) -> int:
    """Cache tensors that the form updates."""
    return 0 if form.get("shared") else 1 + bool(form.get("split"))


@pytest.mark.parametrize("name", FORMS)
def test_absorbed_form(name: str) -> None:
    form, wanted = FORMS[name]
    after, count = fired(absorbed(attention_text(**form)), *lower_attention.RULES)
    updates = "CacheUpdate " * caches_of(form)
    assert (count, op_types(after)) == (1, f"{updates}{wanted} {_PRODUCT}")


@pytest.mark.parametrize("name", FORMS)
def test_half_precision_rows_are_widened_once(name: str) -> None:
    form, _ = FORMS[name]
    wide, _ = fired(absorbed(attention_text(**form)), *lower_attention.RULES)
    after, _ = fired(absorbed(attention_text("fp16", **form)), *lower_attention.RULES)
    casts = op_types(after).split().count("Cast") - op_types(wide).split().count("Cast")
    assert casts == 1 + bool(form.get("split"))


def test_many_heads_read_the_rows_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other order of operands: fewer nodes, the same numbers."""
    few, _ = fired(absorbed(attention_text()), *lower_attention.RULES)
    monkeypatch.setattr(lower_attention, "_FEW_HEADS", H - 1)
    many, _ = fired(absorbed(attention_text()), *lower_attention.RULES)
    assert dense() in op_types(few)
    assert dense().replace(_READ, "MatMul") in op_types(many)
    for lengths in (LENGTHS, STEPS["every slot is seen"]):
        feeds = attention_feeds(lengths=lengths, seed=1)
        wanted, found = run(few, feeds), run(many, feeds)
        for name in wanted:
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-6)


# cached, new, new tokens of the call, rows: with a choice of 3, fewer, as many and more tokens.
STEPS: dict[str, tuple[list[int], list[int], int, int]] = {
    "padded, full and idle": LENGTHS,
    "one new token each": ([3, 7, 1], [1, 1, 1], 1, 8),
    "one new token, one row idle": ([3, 5, 2], [1, 0, 1], 1, 8),
    "every slot is seen": ([7, 7], [1, 1], 1, 8),
    "every slot is seen, one row idle": ([7, 8], [1, 0], 1, 8),
    "full, two new tokens": ([6, 6], [2, 2], 2, 8),
    "three slots, one new token": ([1, 2], [1, 1], 1, 3),
    "three slots, all seen": ([2, 2], [1, 1], 1, 3),
    "two slots": ([1, 1], [1, 0], 1, 2),
    "from nothing": ([0, 0], [3, 1], 3, 6),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", FORMS)
def test_numbers(name: str, step: str) -> None:
    """Before, after and numpy float64 agree; the slots that were never written hold NaN."""
    form, _ = FORMS[name]
    before = parsed(attention_text(**form))
    after, _ = fired(before, *absorb.RULES, *lower_attention.RULES)
    feeds = attention_feeds(lengths=STEPS[step], seed=1, **form)
    assert feeds["all_visible"] == (step.startswith(("every slot", "three slots, all")))
    found = run(after, feeds)
    assert distance(found, run(before, feeds)) < TOLERANCE["fp32"]
    reference = attention_reference(feeds, form.get("count", 0))
    assert np.abs(found["out"] - reference).max() < TOLERANCE["fp32"]


@pytest.mark.parametrize("growing", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", FORMS)
def test_numbers_of_every_storage(name: str, dtype: str, growing: bool) -> None:
    form = {**FORMS[name][0], "growing": growing}
    before = parsed(attention_text(dtype, **form))
    after, _ = fired(before, *absorb.RULES, *lower_attention.RULES)
    feeds = attention_feeds(dtype, **form)
    found, reference = run(after, feeds), attention_reference(feeds, form.get("count", 0))
    # Both sides hold the same stored bytes, so the arithmetic is fp32's on both.
    assert distance(found, run(before, feeds)) < TOLERANCE["fp32"]
    assert np.abs(found["out"] - reference).max() < TOLERANCE[dtype]


def test_where_every_slot_is_seen_nothing_is_masked() -> None:
    """The branch without a mask is taken: a wrong mask changes nothing there, and all else does."""
    after, _ = fired(absorbed(attention_text()), *lower_attention.RULES)
    feeds = attention_feeds(lengths=STEPS["every slot is seen"])
    wanted = run(after, feeds)
    feeds["visible"] = np.zeros_like(feeds["visible"])
    assert distance(run(after, feeds), wanted) == 0.0
    feeds["all_visible"] = np.array(False)
    assert distance(run(after, feeds), wanted) > 1e-2


def test_one_new_token_reads_the_rows_that_it_chose_and_no_other() -> None:
    """Numbers of rows that were not chosen are NaN: a mask would not keep them out."""
    form = {"count": 3}
    after, _ = fired(absorbed(attention_text(**form)), *lower_attention.RULES)
    feeds = attention_feeds(lengths=([5, 7], [1, 1], 1, 8), **form)
    wanted = attention_reference(feeds, 3)
    best_BK = np.argsort(-feeds["scores"][:, 0], axis=-1)[:, :3]
    for b, best in enumerate(best_BK):
        assert feeds["visible"][b, 0, 0, best].all()
        left = [t for t in range(feeds["cache0"].shape[2]) if t not in best]
        feeds["cache0"][b, 0, left] = np.nan
    assert np.abs(run(after, feeds)["out"] - wanted).max() < TOLERANCE["fp32"]


@pytest.mark.parametrize("new", [1, 2])
def test_a_choice_of_every_token_masks_nothing(new: int) -> None:
    """T = count: whatever was chosen, each visible token is read."""
    form = {"count": 8}
    after, _ = fired(absorbed(attention_text(**form)), *lower_attention.RULES)
    feeds = attention_feeds(lengths=([5, 3], [new, new], new, 8), **form)
    wanted = attention_reference(feeds)
    assert np.abs(run(after, feeds)["out"] - wanted).max() < TOLERANCE["fp32"]


OWN: dict[str, tuple[dict[str, Any], str]] = {
    "dense": ({}, "visible"),
    "split, sinks": ({"split": True, "sinks": True}, "visible"),
    "shared rows": ({"shared": True}, "visible"),
    "sparse": ({"count": 3}, "visible, chosen"),
    "sparse, every token chosen": ({"count": 8}, "visible, chosen"),
}


@pytest.mark.parametrize("step", ["every slot is seen", "padded, full and idle"])
@pytest.mark.parametrize("name", OWN)
def test_a_mask_of_the_layer_s_own_is_never_skipped(name: str, step: str) -> None:
    """All is visible to the plan, and the layer hides some of it nevertheless."""
    form, operand = OWN[name]
    text = attention_text(**form).replace("bool all_visible", "bool all_visible, bool[total] kept")
    head, _, tail = text.rpartition(f"{operand}")
    at = head.rindex("\n")
    text = (
        f"{head[:at]}\n mine = And (visible, kept){head[at:]}{operand.replace('visible', 'mine')}"
    )
    before = parsed(text + tail)
    after, count = fired(before, *absorb.RULES, *lower_attention.RULES)
    assert count == 2
    feeds = attention_feeds(lengths=STEPS[step], seed=2, **form)
    feeds["kept"] = np.array([False, True, True, False, True, True, True, True])
    if "count" in form:
        feeds["scores"] = np.where(feeds["kept"], feeds["scores"], np.float32(-1e30))
    found = run(after, feeds)
    assert distance(found, run(before, feeds)) < TOLERANCE["fp32"]
    whole = attention_reference(feeds, form.get("count", 0))
    batch, _, new, _ = feeds["visible"].shape
    kept_X = np.flatnonzero(feeds["kept"])
    feeds["chosen"] = np.broadcast_to(kept_X, (batch, new, kept_X.size))
    reference = attention_reference(feeds, form.get("count", 0))
    assert np.abs(found["out"] - reference).max() < TOLERANCE["fp32"]
    assert "count" in form or np.abs(whole - reference).max() > 1e-2


@pytest.mark.parametrize("new", [1, 2])
def test_a_choice_of_minus_one_is_none(new: int) -> None:
    """A pooled indexer has places for more tokens than it finds; the last token is not meant."""
    text = attention_text(count=4).replace(
        "float[batch,new,total] scores", "int32[batch,new,k] chosen"
    )
    text = text.replace("chosen = mla_deploy.ChooseTokens <count: int = 4> (scores)\n", "")
    after, _ = fired(absorbed(text), *lower_attention.RULES)
    feeds = attention_feeds(lengths=([8 - new, 8 - new], [new, new], new, 8))
    chosen = np.array([[[0, -1, 5, -1], [-1, -1, 7, 2]], [[-1, 1, -1, 6], [4, -1, -1, -1]]])
    feeds["chosen"] = chosen[:, :new].astype(np.int32)
    wanted = attention_reference(feeds)
    for model in (after, parsed(text)):
        assert np.abs(run(model, feeds)["out"] - wanted).max() < TOLERANCE["fp32"]


def test_an_unlowered_mask_means_the_same() -> None:
    """The choice's own rules, before the attention's: the composite behind the mask is gone."""
    before = absorbed(attention_text(count=3))
    rules = (lower_choice.CHOOSE, lower_choice.SELECT, *lower_attention.RULES)
    after, count = fired(before, *rules)
    assert count == 3
    feeds = attention_feeds(count=3)
    assert distance(run(after, feeds), run(before, feeds)) < TOLERANCE["fp32"]


TWICE = "out = mla_deploy.Attention <scale: float = 0.4> (query, key, value, visible)"


def test_two_attentions_in_one_layer() -> None:
    """Branches of both lie side by side in one graph, and names in them are the same."""
    second = """key2, value2 = mla_deploy.ExpandLatent
            <heads: int = 3, nope: int = 4, value: int = 5>
            (latent, rope_key, w_kv_b)
        out2 = mla_deploy.Attention <scale: float = 0.9> (query, key2, value2, visible)
        """
    text = attention_text().replace("] out,", "] out, float[batch,3,new,5] out2,")
    assert TWICE in text
    before = parsed(text.replace(TWICE, f"{second}{TWICE}"))
    after, count = fired(before, *absorb.RULES, *lower_attention.RULES)
    assert count == 4
    feeds = attention_feeds()
    found = run(after, feeds)
    assert distance(found, run(before, feeds)) < TOLERANCE["fp32"]
    assert distance({"out": found["out2"]}, found, ["out"]) > 1e-2


_ROPE = "rope_key = Slice (rows, rank, last, axis)"
_LATENT = "latent = Slice (rows, first, rank, axis)"
_BOTH = f"{_LATENT}\n        {_ROPE}"
MISSES = {
    "rows of two caches": (
        _ROPE,
        """other_out, other = mla_deploy.CacheUpdate <cleared: int = 1>
            (cache0, new_rows, filled, all_visible, active, source, slot)
        rope_key = Slice (other, rank, last, axis)""",
    ),
    "rope key first": (
        _BOTH,
        f"""two = Constant <value_ints: ints = [{R}]> ()
        rope_key = Slice (rows, first, two, axis)
        latent = Slice (rows, two, last, axis)""",
    ),
    "rope key not right behind the latent": (
        _ROPE,
        """seven = Constant <value_ints: ints = [7]> ()
        nine = Constant <value_ints: ints = [9]> ()
        rope_key = Slice (rows, seven, nine, axis)""",
    ),
    "rows that are no cache": (_LATENT, "latent = Slice (new_rows, first, rank, axis)"),
    "a latent that is not a slice": (
        _LATENT, "cut = Slice (rows, first, rank, axis)\n        latent = Neg (cut)"
    ),
    "a start that is computed": (
        _ROPE,
        f"rank2 = Mul (rank, two)\n        {_ROPE.replace('rank,', 'rank2,')}",
    ),
    "both from a copy": (
        _BOTH,
        """copied = Neg (rows)
        latent = Slice (copied, first, rank, axis)
        rope_key = Slice (copied, rank, last, axis)""",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISSES)
def test_not_one_fused_row(name: str) -> None:
    text = attention_text()
    assert MISSES[name][0] in text
    text = text.replace(*MISSES[name])
    if "two)" in MISSES[name][1]:
        text = text.replace("bool all_visible", "bool all_visible, int64[1] two")
    before = absorbed(text)
    after, count = fired(before, *lower_attention.RULES)
    assert (count, op_types(after)) == (0, op_types(before))


def test_a_row_wider_than_latent_and_rope_key() -> None:
    """The row holds one number more than the two slices; multiplying all of it would be wrong."""
    text = attention_text().replace("batch,1,new,10]", "batch,1,new,11]")
    text = text.replace("batch,1,total,10]", "batch,1,total,11]")
    text = text.replace("[9223372036854775807]", "[10]")
    assert fired(absorbed(text), *lower_attention.RULES)[1] == 0


@pytest.mark.parametrize(
    ("form", "old", "new"),
    [
        # A rope key, or a latent, that no cache holds.
        ({"split": True}, "(latent, rope_key, w_kv_b)", "(latent, new_key, w_kv_b)"),
        ({"split": True}, "(latent, rope_key, w_kv_b)", "(new_latent, rope_key, w_kv_b)"),
        ({"rope": 0}, "(latent, rope_key, w_kv_b)", "(new_rows, rope_key, w_kv_b)"),
        # A cache composite of somebody else.
        ({}, "mla_deploy.CacheUpdate", "mine.CacheUpdate"),
        ({"shared": True}, "mla_deploy.CacheRead", "mine.CacheRead"),
    ],
)
def test_rows_that_no_cache_holds(form: dict[str, Any], old: str, new: str) -> None:
    text = attention_text(**form)
    assert old in text
    before = absorbed(text.replace(old, new))
    after, count = fired(before, *lower_attention.RULES)
    assert (count, op_types(after)) == (0, op_types(before))


@pytest.mark.parametrize("sinks", [False, True])
def test_each_rule_leaves_the_other_form_alone(sinks: bool) -> None:
    before = absorbed(attention_text(sinks=sinks))
    assert fired(before, lower_attention.RULES[not sinks])[1] == 0


def test_an_expanded_graph_is_not_lowered_here() -> None:
    assert fired(parsed(attention_text()), *lower_attention.RULES)[1] == 0


def test_sizes_are_those_of_the_text() -> None:
    """What the near-misses above spell out in figures."""
    assert (H, L, R, L + R) == (3, 8, 2, 10)
