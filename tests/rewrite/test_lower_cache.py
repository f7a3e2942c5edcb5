"""lower: the cache update as a scatter, in place or growing, in the cache's own dtype."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from mla_deploy.rewrite import absorb, lower_attention, lower_cache
from tests.rewrite.graphs import (
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
    rules = (absorb.RULE, lower_attention.FUSED_ROW, lower_cache.rule(False))
    after, _ = fired(parsed(attention_text()), *rules)
    assert op_types(after).startswith("Squeeze GatherND GatherND Where ScatterND SplitHeads")


@pytest.mark.parametrize("rules", [(), (absorb.RULE, lower_attention.FUSED_ROW)])
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


def test_another_domain_s_update_stays() -> None:
    before = parsed(attention_text().replace("mla_deploy.CacheUpdate", "mine.CacheUpdate"))
    assert fired(before, lower_cache.rule(False))[1] == 0


def test_an_update_with_other_operands_stays() -> None:
    text = attention_text().replace(
        "(cache0, new_rows, filled, all_filled, active, source, slot)",
        "(cache0, new_rows, filled, all_filled, active, source)",
    )
    assert fired(parsed(text), lower_cache.rule(False))[1] == 0


def test_width_of_the_row_is_free() -> None:
    """Nothing but shapes ties the update to [latent | rope key]: the split caches use it too."""
    text = attention_text(split=True)
    after, count = fired(parsed(text), lower_cache.rule(False))
    assert count == 2
    assert all(W not in (v.shape or ()) for v in after.graph.outputs)
