"""lower: the cache update as a scatter, in place or growing, in the cache's own dtype."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from mla_deploy.rewrite import absorb, lower_attention, lower_cache
from tests.rewrite.graphs import (
    STORED,
    TOLERANCE,
    W,
    attention_feeds,
    attention_text,
    distance,
    fired,
    op_types,
    parsed,
    run,
)

_TAIL = " Slice Slice ExpandLatent Attention"
_WRITE = "Squeeze GatherND GatherND {}Where {}ScatterND {}Where".format
_LONGER = "Shape Shape Concat Expand Cast Concat "


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("growing", [False, True])
def test_fires(growing: bool, dtype: str) -> None:
    before = parsed(attention_text(dtype, growing=growing))
    after, count = fired(before, lower_cache.rule(growing))
    cast = ("" if dtype == "fp32" else "Cast ",) * 3
    wanted = (_LONGER if growing else "") + _WRITE(*cast) + _TAIL
    assert (count, op_types(after)) == (1, wanted)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("growing", [False, True])
def test_same_bytes_and_numbers(growing: bool, dtype: str, split: bool) -> None:
    before = parsed(attention_text(dtype, split=split, growing=growing))
    after, count = fired(before, lower_cache.rule(growing))
    assert count == 1 + split
    feeds = attention_feeds(dtype, split=split, growing=growing)
    found, wanted = run(after, feeds), run(before, feeds)
    caches = [name for name in wanted if name.startswith("cache")]
    assert distance(found, wanted, caches) == 0.0
    assert distance(found, wanted, ["out"]) < TOLERANCE["fp32"]


def test_rows_nobody_reads_are_not_made() -> None:
    """Absorbed attention reads the cache itself: no cleared copy of it is left in the graph."""
    rules = (*absorb.RULES, *lower_attention.RULES, lower_cache.rule(False))
    after, _ = fired(parsed(attention_text()), *rules)
    assert op_types(after).startswith("Squeeze GatherND GatherND Where ScatterND SplitHeads")


@pytest.mark.parametrize("rules", [(), (*absorb.RULES, *lower_attention.RULES)])
def test_one_buffer_bound_as_input_and_output(rules: tuple[object, ...]) -> None:
    """In place: the bound buffer gets the new rows and nothing else; NaN beyond stays NaN."""
    model, _ = fired(parsed(attention_text()), *rules, lower_cache.rule(False))
    feeds = attention_feeds()
    wanted = run(parsed(attention_text()), feeds)
    cache = feeds["cache0"].copy()
    found = _run_in_place(model, {**feeds, "cache0": cache})
    assert distance({"out": found}, wanted, ["out"]) < TOLERANCE["fp32"]
    np.testing.assert_array_equal(cache, wanted["cache0_out"])


def _run_in_place(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    from mla_deploy.rewrite.composites import add_bodies

    add_bodies(model)
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    for value in session.get_inputs():
        array = np.ascontiguousarray(feeds[value.name])
        feeds[value.name] = array
        binding.bind_input(value.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    cache = feeds["cache0"]
    binding.bind_output("out")
    binding.bind_output("cache0_out", "cpu", 0, np.float32, cache.shape, cache.ctypes.data)
    session.run_with_iobinding(binding)
    return binding.get_outputs()[0].numpy()


UNCLEARED = f"""keys (float[batch,1,new,{W}] new_rows, {{kind}}[batch,1,total,{W}] cache0,
    bool[batch,1,total,1] filled, bool all_visible, bool[batch,1,1] active,
    int64[batch,new,1] source, int64[batch,new,3] slot)
    => ({{kind}}[batch,1,total,{W}] cache0_out, float[batch,1,total,{W}] rows) {{{{
    cache0_out, rows = mla_deploy.CacheUpdate <cleared: int = 0>
        (cache0, new_rows, filled, all_visible, active, source, slot) }}}}"""


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_that_come_as_they_lie(dtype: str) -> None:
    """An indexer's keys: stale ones are scored and masked, so nothing is cleared."""
    before = parsed(UNCLEARED.format(kind=STORED[dtype][0]))
    after, count = fired(before, lower_cache.rule(False))
    half = dtype != "fp32"
    write = "Squeeze GatherND GatherND Cast Where Cast ScatterND" if half else (
        "Squeeze GatherND GatherND Where ScatterND"
    )  # fmt: skip
    assert (count, op_types(after)) == (1, f"{write} {'Cast' if half else 'Identity'}")
    feeds = attention_feeds(dtype)
    found, wanted = run(after, feeds), run(before, feeds)
    assert distance(found, wanted) == 0.0
    np.testing.assert_array_equal(found["rows"], found["cache0_out"].astype(np.float32))
    assert np.isnan(found["rows"]).any()


READ = f"""rows (float[batch,1,new,{W}] new_rows, {{kind}}[batch,1,total,{W}] cache0,
    bool[batch,1,total,1] filled, bool all_visible) => (float[batch,1,total,{W}] rows) {{{{
    rows = mla_deploy.CacheRead (cache0, filled, all_visible) }}}}"""


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_that_another_layer_stored(dtype: str) -> None:
    before = parsed(READ.format(kind=STORED[dtype][0]))
    after, count = fired(before, lower_cache.READ)
    assert (count, op_types(after)) == (1, "Where" if dtype == "fp32" else "Cast Where")
    feeds = attention_feeds(dtype, shared=True)
    found = run(after, feeds)
    assert distance(found, run(before, feeds)) == 0.0
    wanted = np.zeros((3, 1, 8, W))
    for b, length in enumerate([4, 6, 2]):
        wanted[b, 0, :length] = feeds["cache0"][b, 0, :length].astype(np.float64)
    np.testing.assert_array_equal(found["rows"], wanted)


def test_another_domain_s_read_stays() -> None:
    text = READ.format(kind="float").replace("mla_deploy", "mine")
    assert fired(parsed(text), lower_cache.READ)[1] == 0


def test_another_domain_s_update_stays() -> None:
    before = parsed(attention_text().replace("mla_deploy.CacheUpdate", "mine.CacheUpdate"))
    assert fired(before, lower_cache.rule(False))[1] == 0


def test_an_update_with_other_operands_stays() -> None:
    text = attention_text().replace(
        "(cache0, new_rows, filled, all_visible, active, source, slot)",
        "(cache0, new_rows, filled, all_visible, active, source)",
    )
    assert fired(parsed(text), lower_cache.rule(False))[1] == 0


def test_width_of_the_row_is_free() -> None:
    """Nothing but shapes ties the update to [latent | rope key]: the split caches use it too."""
    text = attention_text(split=True)
    after, count = fired(parsed(text), lower_cache.rule(False))
    assert count == 2
    assert all(W not in (v.shape or ()) for v in after.graph.outputs)
