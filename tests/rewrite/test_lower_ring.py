"""lower: the ring of a sliding layer, over whole conversations, against one that forgets nothing.

The reference keeps every token of every row in a list; a ring must show what of it is within reach.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from mla_deploy.rewrite import absorb, lower_attention, lower_expanded, lower_ring, lower_ring_trt
from mla_deploy.source.plan import RING_OPERANDS, ring_plan
from tests.rewrite.graphs import (
    SCALE,
    STORED,
    TOLERANCE,
    Arrays,
    E,
    H,
    L,
    N,
    R,
    V,
    W,
    attention_reference,
    distance,
    fired,
    op_types,
    parsed,
    plan,
    run,
)

_PLAN = """bool[batch,1,new,seen] ring_visible_B1SU, bool[batch,1,seen,1] ring_filled_B1U1,
    int64[batch,new,1] ring_source_BS1, int64[batch,new,3] ring_slot_BS3"""
_UPDATE = """ring_out, rows = mla_deploy.RingUpdate
    (ring, new_rows, ring_filled_B1U1, ring_source_BS1, ring_slot_BS3)"""


def ring_text(window: int, dtype: str = "fp32") -> str:
    kind = STORED[dtype][0]
    return f"""g (float[batch,1,new,{W}] new_rows, {kind}[batch,1,{window},{W}] ring, {_PLAN})
        => ({kind}[batch,1,{window},{W}] ring_out, float[batch,1,seen,{W}] rows) {{
        {_UPDATE} }}"""


def attention_text(window: int, dtype: str = "fp32", *, sinks: bool = False) -> str:
    """One step of a sliding layer, latent and rope key in one row."""
    kind = STORED[dtype][0]
    attend, more, also = (
        ("SinkAttention", f", float[{H}] sinks", ", sinks") if sinks else ("Attention", "", "")
    )
    return f"""g (float[batch,{H},new,{E}] query, float[batch,1,new,{W}] new_rows,
        {kind}[batch,1,{window},{W}] ring, {_PLAN}{more}, float[{H * (N + V)},{L}] w_kv_b)
        => (float[batch,{H},new,{V}] out, {kind}[batch,1,{window},{W}] ring_out)
        <float[batch,1,seen,{W}] rows, float[batch,1,seen,{L}] latent,
         float[batch,1,seen,{R}] rope_key, float[batch,{H},seen,{E}] key,
         float[batch,{H},seen,{V}] value> {{
        first = Constant <value_ints: ints = [0]> ()
        rank = Constant <value_ints: ints = [{L}]> ()
        last = Constant <value_ints: ints = [9223372036854775807]> ()
        axis = Constant <value_ints: ints = [3]> ()
        {_UPDATE}
        latent = Slice (rows, first, rank, axis)
        rope_key = Slice (rows, rank, last, axis)
        key, value = mla_deploy.ExpandLatent <heads: int = {H}, nope: int = {N}, value: int = {V}>
            (latent, rope_key, w_kv_b)
        out = mla_deploy.{attend} <scale: float = {SCALE}>
            (query, key, value, ring_visible_B1SU{also}) }}"""


def step_feeds(cached: list[int], new: list[int], width: int, window: int) -> Arrays:
    made = ring_plan(torch.arange(width), torch.tensor(cached), torch.tensor(new), window)
    return {name: getattr(made, name).numpy() for name in RING_OPERANDS}


# New tokens of each row, call by call: ragged, with idle rows, fewer and more than a window of 4.
CALLS = [[3, 1, 0], [1, 0, 2], [4, 4, 4], [0, 6, 9], [1, 1, 1], [2, 5, 0], [1, 0, 1]]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_fires(dtype: str) -> None:
    before = parsed(ring_text(4, dtype))
    after, count = fired(before, lower_ring.RULE)
    wanted = "Concat Squeeze GatherND ScatterND Where"
    if dtype != "fp32":
        wanted = f"Cast {wanted}".replace("ScatterND", "Cast ScatterND")
    assert (count, op_types(after)) == (1, wanted)


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [1, 3, 4, 9, 40])
def test_a_conversation(window: int, dtype: str, lowered: bool) -> None:
    """The ring is smaller than, as large as and larger than the new tokens; it begins as NaN."""
    random = np.random.default_rng(window)
    model = parsed(ring_text(window, dtype))
    if lowered:
        model, _ = fired(model, lower_ring.RULE)
    stored = STORED[dtype][1]
    ring = np.full((3, 1, window, W), np.nan, np.float32)
    history: list[list[np.ndarray]] = [[], [], []]
    for new in CALLS:
        width, cached = max(new), [len(tokens) for tokens in history]
        rows = random.standard_normal((3, 1, width, W)).astype(np.float32)
        feeds = {"ring": ring.astype(stored), "new_rows": rows}
        feeds |= step_feeds(cached, new, width, window)
        found = run(model, feeds)
        seen, before = feeds["ring_visible_B1SU"][:, 0], feeds["ring_filled_B1U1"][:, 0, :, 0]
        for b, count in enumerate(new):
            fresh = [rows[b, 0, s] for s in range(count)]
            for s in range(count):
                # The last `window` tokens up to and with this one, in whatever order.
                reach = [*history[b], *fresh[: s + 1]][-window:]
                assert same_rows(found["rows"][b, 0][seen[b, s]], reach)
            assert (found["rows"][b, 0][~before[b]] == 0).all()
            history[b] += [row.astype(stored).astype(np.float32) for row in fresh]
            ring_after = found["ring_out"][b, 0].astype(np.float32)
            for p in range(max(0, len(history[b]) - window), len(history[b])):
                np.testing.assert_array_equal(ring_after[p % window], history[b][p])
            assert np.isnan(ring_after[len(history[b]) :]).all()
        ring = found["ring_out"].astype(np.float32)


def same_rows(found: np.ndarray, wanted: list[np.ndarray]) -> bool:
    """Equal as sets of rows, each of which is there once."""
    return sorted(map(tuple, found.tolist())) == sorted(tuple(row.tolist()) for row in wanted)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_same_bytes(dtype: str) -> None:
    before = parsed(ring_text(4, dtype))
    after, _ = fired(before, lower_ring.RULE)
    random = np.random.default_rng(0)
    ring = random.standard_normal((3, 1, 4, W)).astype(STORED[dtype][1])
    ring[1, 0, 2:] = np.nan
    feeds = {"ring": ring, "new_rows": random.standard_normal((3, 1, 3, W)).astype(np.float32)}
    feeds |= step_feeds([7, 2, 5], [3, 1, 0], 3, 4)
    found, wanted = run(after, feeds), run(before, feeds)
    assert distance(found, wanted) == 0.0


def test_for_tensorrt_what_is_stale_is_not_cleared() -> None:
    """The ring it leaves is the same; of what is read, so is every row that holds a token."""
    before = parsed(ring_text(4))
    after, count = fired(before, lower_ring_trt.RULE)
    assert (count, op_types(after)) == (1, "Concat Squeeze GatherND ScatterND Identity")
    random = np.random.default_rng(3)
    ring = random.standard_normal((3, 1, 4, W)).astype(np.float32)
    feeds = {"ring": ring, "new_rows": random.standard_normal((3, 1, 3, W)).astype(np.float32)}
    feeds |= step_feeds([7, 2, 0], [3, 1, 0], 3, 4)
    found, wanted = run(after, feeds), run(before, feeds)
    np.testing.assert_array_equal(found["ring_out"], wanted["ring_out"])
    filled = np.broadcast_to(feeds["ring_filled_B1U1"], wanted["rows"].shape)
    np.testing.assert_array_equal(found["rows"][filled], wanted["rows"][filled])
    assert not wanted["rows"][~filled].any() and found["rows"][~filled].all()


def test_an_idle_row_keeps_its_bytes() -> None:
    """Also NaN payloads and numbers that fp32 would round are only moved within one dtype."""
    after, _ = fired(parsed(ring_text(4, "bf16")), lower_ring.RULE)
    ring = np.arange(4 * W).reshape(1, 1, 4, W).astype(ml_dtypes.bfloat16)
    feeds = {"ring": ring, "new_rows": np.full((1, 1, 2, W), np.nan, np.float32)}
    feeds |= step_feeds([6], [0], 2, 4)
    np.testing.assert_array_equal(run(after, feeds)["ring_out"], ring.astype(np.float32))


_ATTENTION = {
    "absorbed": (*absorb.RULES, *lower_attention.RULES),
    "expanded": lower_expanded.RULES,
}


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("form", _ATTENTION)
def test_attention_over_a_ring(form: str, sinks: bool) -> None:
    """As over a whole cache whose mask hides what is older than the window."""
    window, new, width = 4, [3, 1, 0], 3
    cached = [7, 2, 5]
    before = parsed(attention_text(window, sinks=sinks))
    after, count = fired(before, *_ATTENTION[form], lower_ring.RULE)
    assert count == (3 if form == "absorbed" else 2)
    assert "If[" not in op_types(after)  # a ring is cleared where it is read, and always masked
    random = np.random.default_rng(5)
    whole = random.standard_normal((3, 1, 12, W)).astype(np.float32)
    ring = np.full((3, 1, window, W), np.nan, np.float32)
    for b, past in enumerate(cached):
        for p in range(max(0, past - window), past):
            ring[b, 0, p % window] = whole[b, 0, p]
    feeds = {
        "query": random.standard_normal((3, H, width, E)).astype(np.float32),
        "w_kv_b": random.standard_normal((H * (N + V), L)).astype(np.float32) / 2,
        "new_rows": random.standard_normal((3, 1, width, W)).astype(np.float32),
        "ring": ring,
        **step_feeds(cached, new, width, window),
    }
    if sinks:
        feeds["sinks"] = random.standard_normal(H).astype(np.float32)
    # The reference sees the window as a cache of its own, one new token of one row at a time.
    found, wanted = run(after, feeds), run(before, feeds)
    assert distance(found, wanted, ["ring_out"]) == 0.0
    for b, count in enumerate(new):
        for s in range(count):
            tokens = np.concatenate((whole[b, 0, : cached[b]], feeds["new_rows"][b, 0, : s + 1]))
            reach = tokens[-window:][None, None]
            one = {
                "query": feeds["query"][b : b + 1, :, s : s + 1],
                "new_rows": reach[:, :, -1:],
                "cache0": reach,
                "w_kv_b": feeds["w_kv_b"],
                **plan([reach.shape[2] - 1], [1], 1, reach.shape[2]),
                **({"sinks": feeds["sinks"]} if sinks else {}),
            }
            reference = attention_reference(one)[0, :, 0]
            for out in (found["out"], wanted["out"]):
                assert np.abs(out[b, :, s] - reference).max() < TOLERANCE["fp32"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mla_deploy.RingUpdate", "mine.RingUpdate"),
        (", ring_slot_BS3)", ")"),
        ("mla_deploy.RingUpdate", "mla_deploy.CacheUpdate"),
    ],
)
def test_near_miss(old: str, new: str) -> None:
    text = ring_text(4)
    head, _, tail = text.rpartition(old)
    before = parsed(head + new + tail)
    after, count = fired(before, lower_ring.RULE)
    assert (count, op_types(after)) == (0, op_types(before))
