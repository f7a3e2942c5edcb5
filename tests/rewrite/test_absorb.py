"""absorb: attention over the expanded latent becomes attention over the latent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mla_deploy.rewrite import absorb
from tests.rewrite.graphs import (
    SCALE,
    TOLERANCE,
    H,
    L,
    N,
    R,
    V,
    attention_feeds,
    attention_reference,
    attention_text,
    distance,
    fired,
    op_types,
    parsed,
    run,
)

# q_nope W_uk, attention over the latent, out W_uv: each product with its heads in front.
_PRODUCT = "Transpose Reshape MatMul Shape Concat Reshape Transpose"
ABSORBED = f"CacheUpdate Slice Slice SplitHeads Split {_PRODUCT} LatentAttention {_PRODUCT}"


FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({}, ABSORBED),
    "split": ({"split": True}, ABSORBED.replace("Slice Slice", "CacheUpdate")),
    "sinks": ({"sinks": True}, ABSORBED.replace("LatentAttention", "LatentSinkAttention")),
    # The query is all nope: what is cut off it is the part of no width.
    "no rope": ({"rope": 0}, ABSORBED.replace("Slice Slice", "Slice").replace("Split ", "Slice ")),
    "sparse": (
        {"count": 3}, ABSORBED.replace("Slice Slice", "Slice Slice ChooseTokens SelectVisible")
    ),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FORMS)
def test_fires(name: str, seed: int) -> None:
    form, wanted = FORMS[name]
    before = parsed(attention_text(**form))
    after, count = fired(before, *absorb.RULES)
    assert (count, op_types(after)) == (1, wanted)
    feeds = attention_feeds(seed=seed, **form)
    found = run(after, feeds)
    assert distance(found, run(before, feeds)) < TOLERANCE["fp32"]
    reference = attention_reference(feeds, form.get("count", 0))
    assert np.abs(found["out"] - reference).max() < TOLERANCE["fp32"]


@pytest.mark.parametrize("sinks", [False, True])
def test_each_rule_leaves_the_other_form_alone(sinks: bool) -> None:
    other = absorb.RULES[not sinks]
    assert fired(parsed(attention_text(sinks=sinks)), other)[1] == 0


@pytest.mark.parametrize(
    ("sinks", "op_type"), [(False, "LatentAttention"), (True, "LatentSinkAttention")]
)
def test_scale_and_heads_are_kept(sinks: bool, op_type: str) -> None:
    after, _ = fired(parsed(attention_text(sinks=sinks)), *absorb.RULES)
    node = next(node for node in after.graph if node.op_type == op_type)
    assert node.attributes["scale"].as_float() == np.float32(SCALE)
    assert node.attributes["heads"].as_int() == H
    assert [v.name for v in node.inputs if v is not None][5:] == (["sinks"] if sinks else [])


def joined(first: int = N, second: int = R) -> str:
    """The query as a trace leaves it: two parts just joined."""
    text = attention_text().replace(
        f"float[batch,{H},new,{N + R}] query",
        f"float[batch,{H},new,{first}] q_nope, float[batch,{H},new,{second}] q_rope",
    )
    text = text.replace("<float[batch,1", f"<float[batch,{H},new,{N + R}] query, float[batch,1")
    join = "query = Concat <axis: int = -1> (q_nope, q_rope)"
    return text.replace("first = Constant", f"{join}\nfirst = Constant")


def test_a_query_just_joined_is_not_split_again() -> None:
    after, count = fired(parsed(joined()), *absorb.RULES)
    assert count == 1
    # The parts themselves are read: neither a Split nor the join is left.
    assert op_types(after) == ABSORBED.replace("Split ", "")


def test_a_query_joined_elsewhere_is_split() -> None:
    """Two parts of other widths than N and R: only their sum fits."""
    before = parsed(joined(2, 4))
    after, count = fired(before, *absorb.RULES)
    assert (count, "Split " in op_types(after)) == (1, True)
    feeds = attention_feeds()
    query = feeds.pop("query")
    feeds |= {"q_nope": query[..., :2], "q_rope": query[..., 2:]}
    assert distance(run(after, feeds), run(before, feeds)) < TOLERANCE["fp32"]


WEIGHT = f"float[{H * (N + V)},{L}] w_kv_b"
OUT = f"=> (float[batch,{H},new,{V}] out,"
MISSES = {
    "w_kv_b of another size": (WEIGHT, f"float[{H * (N + V) + 1},{L}] w_kv_b"),
    "w_kv_b of another rank": (WEIGHT, f"float[{H * (N + V)},{L + 1}] w_kv_b"),
    "w_kv_b of unknown size": (WEIGHT, "float[k,l] w_kv_b"),
    "key read elsewhere": (OUT, f"{OUT} float[batch,{H},total,{N + R}] key,"),
    "value read elsewhere": (OUT, f"{OUT} float[batch,{H},total,{V}] value,"),
    "other heads": (f"{H},new,{N + R}] query", f"{H + 1},new,{N + R}] query"),
    "wider query": (f"{H},new,{N + R}] query", f"{H},new,{N + R + 1}] query"),
    "value is the key": ("(query, key, value, visible)", "(query, key, key, visible)"),
    "key and value exchanged": ("(query, key, value, visible)", "(query, value, key, visible)"),
    "another domain": ("mla_deploy.Attention", "mine.Attention"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISSES)
def test_near_miss(name: str) -> None:
    text = attention_text()
    assert MISSES[name][0] in text
    before = parsed(text.replace(*MISSES[name]))
    after, count = fired(before, *absorb.RULES)
    assert (count, op_types(after)) == (0, op_types(before))


def test_key_and_value_of_two_expansions() -> None:
    text = attention_text().replace("key, value = mla", "key, unread = mla")
    second = f"""other, value = mla_deploy.ExpandLatent
        <heads: int = {H}, nope: int = {N}, value: int = {V}> (latent, rope_key, w_kv_b)
        out ="""
    assert fired(parsed(text.replace("out =", second)), *absorb.RULES)[1] == 0
