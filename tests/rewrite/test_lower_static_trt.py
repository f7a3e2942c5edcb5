"""lower: static codes as quantise, scatter, dequantise; attention over them, against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from mla_deploy.rewrite import absorb, lower_static_trt
from mla_deploy.rewrite.step_inputs import LATENT_SCALE, lift_step_inputs
from tests.rewrite.graphs import (
    L,
    N,
    attention_feeds,
    attention_reference,
    attention_text,
    fired,
    op_types,
    parsed,
    run,
)

SCALE_L = np.linspace(0.004, 0.02, L).astype(np.float32)


def static_model(rope: bool) -> ir.Model:
    """`attention_text` of a split cache whose latent is in static codes."""
    text = attention_text(split=True, **({} if rope else {"rope": 0}))
    update = "CacheUpdate <cleared: int = 1> (cache0, {}, filled, all_visible, "
    new = "new_latent" if rope else "new_rows"
    assert update.format(new) in text
    text = text.replace(update.format(new), f"StaticUpdate (cache0, {new}, ")
    text = text.replace(f"float[batch,1,total,{L}] cache0", f"int8[batch,1,total,{L}] cache0")
    return parsed(text)


def feeds_of(rope: bool) -> dict[str, NDArray[Any]]:
    feeds = attention_feeds(split=True, **({} if rope else {"rope": 0}))
    feeds["cache0"] = codes_of(np.nan_to_num(feeds["cache0"], nan=0.7))
    if rope:
        feeds["cache1"] = np.nan_to_num(feeds["cache1"], nan=0.7)
    return {**feeds, LATENT_SCALE: SCALE_L}


def codes_of(rows: NDArray[Any]) -> NDArray[np.int8]:
    return np.clip(np.rint(rows / SCALE_L), -128, 127).astype(np.int8)


def updated(feeds: dict[str, NDArray[Any]], new: str) -> NDArray[np.int8]:
    """The codes with the new rows in place, row by row."""
    wanted = feeds["cache0"].copy()
    for b, s in np.ndindex(feeds["source"].shape[:2]):
        if feeds["active"][b, 0, 0]:
            row = feeds[new][b, 0, feeds["source"][b, s, 0]]
            wanted[b, 0, feeds["slot"][b, s, 2]] = codes_of(row)
    return wanted


def lowered(model: ir.Model, *rules: Any) -> tuple[ir.Model, int]:
    """After the rules, the scales an input."""
    after, count = fired(model, *rules)
    assert lift_step_inputs(after.graph) == (LATENT_SCALE,)
    after.graph.inputs[-1].shape = ir.Shape([L])
    return after, count


def test_the_update_is_what_numpy_says() -> None:
    """Padding, an idle row, codes cut off at both ends; an idle row's codes stay as they are."""
    model, count = lowered(static_model(rope=True), lower_static_trt.UPDATE)
    assert count == 1
    assert op_types(model).startswith(
        "Squeeze GatherND Shape GatherND Reshape DequantizeLinear Reshape Where Reshape "
        "QuantizeLinear Reshape ScatterND DequantizeLinear"
    )
    feeds = feeds_of(rope=True)
    feeds["new_latent"] = feeds["new_latent"] * 3  # beyond what the scales reach
    found, wanted = run(model, feeds)["cache0_out"], updated(feeds, "new_latent")
    np.testing.assert_array_equal(found, wanted)
    assert {-128, 127} <= set(wanted.ravel().tolist())
    assert (wanted != feeds["cache0"]).any()


def test_every_code_survives_an_idle_row() -> None:
    model, _ = lowered(static_model(rope=True), lower_static_trt.UPDATE)
    feeds = feeds_of(rope=True)
    feeds["active"] = np.zeros_like(feeds["active"])
    every = np.arange(-128, 128).astype(np.int8)
    feeds["cache0"] = np.resize(every, feeds["cache0"].shape)
    np.testing.assert_array_equal(run(model, feeds)["cache0_out"], feeds["cache0"])


@pytest.mark.parametrize("rope", [True, False])
def test_absorbed_attention_reads_the_codes(rope: bool) -> None:
    """Equal to expanded attention in numpy over the rows that the codes stand for."""
    rules = (*absorb.RULES, *lower_static_trt.ATTENTION, lower_static_trt.UPDATE)
    model, count = lowered(static_model(rope), *rules)
    assert count == 3
    assert "LatentAttention" not in op_types(model)
    feeds = feeds_of(rope)
    new = "new_latent" if rope else "new_rows"
    rows = updated(feeds, new).astype(np.float32) * SCALE_L
    whole = dict(feeds)
    whole["cache0"], whole[new] = rows, _as_stored(feeds[new])
    if rope:
        whole["new_rows"] = np.concatenate([whole[new], feeds["new_key"]], axis=-1)
    found = run(model, feeds)["out"]
    wanted = attention_reference(whole)
    active = feeds["active"][:, 0, 0]
    np.testing.assert_allclose(found[active], wanted[active], atol=2e-5)
    assert feeds["query"].shape[-1] == N + (feeds["cache1"].shape[-1] if rope else 0)


def test_a_plain_cache_is_left_alone() -> None:
    rules = (*lower_static_trt.ATTENTION, lower_static_trt.UPDATE)
    _, count = fired(parsed(attention_text(split=True)), *absorb.RULES, *rules)
    assert count == 1  # that of absorbing


def _as_stored(rows: NDArray[Any]) -> NDArray[Any]:
    return codes_of(rows).astype(np.float32) * SCALE_L
