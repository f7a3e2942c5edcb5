"""lower: both attention forms as plain products, over either cache layout, whatever is stale."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from mla_deploy.rewrite import absorb, lower_attention
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
    plan,
    run,
)
from tests.rewrite.test_absorb import _PRODUCT

_SOFTMAX = "Shape Concat Reshape Where Softmax Shape Reshape If[MatMul | Where MatMul]"
_FOLD = "Mul Shape Concat Reshape"  # scaled, then heads folded into rows
FUSED = (
    f"CacheUpdate SplitHeads Split {_PRODUCT} Concat {_FOLD} Transpose MatMul {_SOFTMAX} "
    f"Slice Reshape {_PRODUCT}"
)
SPLIT = (
    f"CacheUpdate CacheUpdate SplitHeads Split {_PRODUCT} {_FOLD} {_FOLD} "
    f"Transpose MatMul Transpose MatMul Add {_SOFTMAX} Reshape {_PRODUCT}"
)
EXPANDED = (
    "SplitHeads Split Transpose MatMul Mul MatMul Mul Transpose MatMul Add Where Softmax "
    "MatMul MatMul"
)
ABSORBED = {False: (lower_attention.FUSED_ROW, FUSED), True: (lower_attention.SPLIT_ROWS, SPLIT)}


def absorbed(text: str) -> ir.Model:
    model, count = fired(parsed(text), absorb.RULE)
    assert count == 1
    return model


@pytest.mark.parametrize("split", [False, True])
def test_absorbed_form(split: bool) -> None:
    rule, wanted = ABSORBED[split]
    after, count = fired(absorbed(attention_text(split=split)), rule)
    assert (count, op_types(after)) == (1, wanted)


@pytest.mark.parametrize("split", [False, True])
def test_half_precision_rows_are_widened_once(split: bool) -> None:
    rule, wanted = ABSORBED[split]
    after, _ = fired(absorbed(attention_text("fp16", split=split)), rule)
    assert op_types(after).count("Cast") == 1 + split
    assert op_types(after).replace("Cast ", "") == wanted


@pytest.mark.parametrize("split", [False, True])
def test_expanded_form(split: bool) -> None:
    before = parsed(attention_text(split=split))
    after, count = fired(before, lower_attention.EXPANDED)
    rows = "CacheUpdate CacheUpdate" if split else "CacheUpdate Slice Slice"
    assert (count, op_types(after)) == (1, f"{rows} {EXPANDED}")


@pytest.mark.parametrize("growing", [False, True])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_numbers(dtype: str, split: bool, growing: bool) -> None:
    """Before, after and numpy float64 agree; the slots that were never written hold NaN."""
    text = attention_text(dtype, split=split, growing=growing)
    feeds = attention_feeds(dtype, split=split, growing=growing)
    wanted = run(parsed(text), feeds)
    reference = attention_reference(feeds)
    expanded = fired(parsed(text), lower_attention.EXPANDED)
    for after, count in (fired(absorbed(text), ABSORBED[split][0]), expanded):
        found = run(after, feeds)
        assert count == 1
        # Both sides hold the same stored bytes, so the arithmetic is fp32's on both.
        assert distance(found, wanted) < TOLERANCE["fp32"]
        assert abs(found["out"] - reference).max() < TOLERANCE[dtype]


def test_a_full_window_takes_the_branch_without_a_copy() -> None:
    feeds = attention_feeds()
    feeds |= plan([6, 6, 6], [2, 2, 2], 2, 8)
    for name in ("cache0", "new_rows"):
        feeds[name] = attention_feeds(seed=4)[name]
    feeds["cache0"][:] = feeds["cache0"][0, 0, 0]
    assert feeds["all_filled"]
    text = attention_text()
    after, _ = fired(absorbed(text), lower_attention.FUSED_ROW)
    assert distance(run(after, feeds), run(parsed(text), feeds)) < TOLERANCE["fp32"]


_ROPE = "rope_key = Slice (rows, rank, last, axis)"
_LATENT = "latent = Slice (rows, first, rank, axis)"
FUSED_MISSES = {
    "rows of two caches": (
        _ROPE,
        """other_out, other = mla_deploy.CacheUpdate
            (cache0, new_rows, filled, all_filled, active, source, slot)
        rope_key = Slice (other, rank, last, axis)""",
    ),
    "rope key first": (
        f"{_LATENT}\n        {_ROPE}",
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
    "both from a copy": (f"{_LATENT}\n        {_ROPE}",
        """copied = Neg (rows)
        latent = Slice (copied, first, rank, axis)
        rope_key = Slice (copied, rank, last, axis)"""),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED_MISSES)
def test_not_one_fused_row(name: str) -> None:
    text = attention_text()
    assert FUSED_MISSES[name][0] in text
    before = absorbed(text.replace(*FUSED_MISSES[name]))
    after, count = fired(before, *(rule for rule, _ in ABSORBED.values()))
    assert (count, op_types(after)) == (0, op_types(before))


def test_a_row_wider_than_latent_and_rope_key() -> None:
    """The row holds one number more than the two slices; multiplying all of it would be wrong."""
    text = attention_text().replace("batch,1,new,10]", "batch,1,new,11]")
    text = text.replace("batch,1,total,10]", "batch,1,total,11]")
    text = text.replace("[9223372036854775807]", "[10]")
    assert fired(absorbed(text), lower_attention.FUSED_ROW)[1] == 0


def test_layouts_do_not_match_each_other() -> None:
    fused, split = absorbed(attention_text()), absorbed(attention_text(split=True))
    assert fired(fused, lower_attention.SPLIT_ROWS)[1] == 0
    assert fired(split, lower_attention.FUSED_ROW)[1] == 0


def test_split_rows_that_no_cache_holds() -> None:
    text = attention_text(split=True).replace(
        "(latent, rope_key, w_kv_b)", "(latent, new_key, w_kv_b)"
    )
    assert fired(absorbed(text), lower_attention.SPLIT_ROWS)[1] == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("float[27,8] w_kv_b", "float[28,8] w_kv_b"),
        ("(query, key, value, visible)", "(query, value, key, visible)"),
        ("=> (float", f"=> (float[batch,{H},total,{N + R}] key, float"),
    ],
)
def test_expanded_near_miss(old: str, new: str) -> None:
    assert old in attention_text()
    before = parsed(attention_text().replace(old, new))
    assert fired(before, lower_attention.EXPANDED)[1] == 0


def test_an_absorbed_graph_is_not_expanded_again() -> None:
    assert fired(absorbed(attention_text()), lower_attention.EXPANDED)[1] == 0
