"""MlaDecode as a function of plain operators: against numpy, and in place of composites."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from mla_deploy.errors import MlaDeployError
from mla_deploy.rewrite import absorb, lower_attention, lower_cache, mla_decode
from mla_deploy.rewrite.composites import add_bodies
from mla_deploy.rewrite.mla_decode_body import add_body, add_tensorrt_body
from mla_deploy.rewrite.order import apply_rules
from plugins.mla_decode.reference import (
    TOLERANCE as CODED_TOLERANCE,
)
from plugins.mla_decode.reference import (
    Problem,
    Shape,
    coded,
    expected,
    problem,
    same_bytes,
)
from tests.rewrite import graphs
from tests.rewrite.graphs import Arrays, attention_feeds, attention_text, op_types, parsed, run

KINDS = {"fp16": "float16", "bf16": "bfloat16"}
CACHES = {"int8": "int8", "fp8": "float8e4m3fn"}


def operator(call: Problem, dtype: str, *, storage: str | None = None) -> ir.Model:
    """A graph of one MlaDecode node for the call, without its body."""
    batch, new, heads, wide = call.query_BSHE.shape
    cache = CACHES.get(call.storage, KINDS[dtype])
    held = f"[{batch},1,{call.cache_B1ME.shape[2]},"
    kind = KINDS[dtype]
    scales_in, scales_out, more = "", "", ("", "")
    if call.storage != "plain":
        scale = f"float{held}{call.scales_B1MG.shape[-1]}]"
        scales_in, scales_out = f", {scale} scales", f", {scale} scales_out"
        more = (", scales", ", scales_out")
    return parsed(f"""step ({kind}[{batch},{new},{heads},{wide}] query,
            {kind}[{batch},{new},{wide}] new_row, {cache}{held}{wide}] cache,
            int64[{batch}] cached, int64[{batch}] fresh{scales_in})
        => ({kind}[{batch},{new},{heads},{call.latent}] out,
            {cache}{held}{wide}] cache_out{scales_out}) {{
        out, cache_out{more[1]} = mla_deploy.MlaDecode <scale: float = {call.scale!r},
            latent: int = {call.latent}, storage: string = "{storage or call.storage}",
            tile: int = {call.tile}, rope_tile: int = {call.rope_tile},
            multiprocessors: int = 16, plugin_namespace: string = "mla_deploy",
            plugin_version: string = "1">
            (query, new_row, cache, cached, fresh{more[0]}) }}""")


def feeds_of(call: Problem) -> Arrays:
    feeds = {"query": call.query_BSHE, "new_row": call.new_row_BSE, "cache": call.cache_B1ME,
             "cached": call.cache_lengths_B, "fresh": call.new_lengths_B}  # fmt: skip
    return {**feeds, **({} if call.storage == "plain" else {"scales": call.scales_B1MG})}


LENGTHS = [(0, 1), (1, 1), (19, 2), (22, 2), (7, 0), (0, 0)]
SMALL = Shape(heads=3, latent=32, rope=16, new=2, capacity=24)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("rope", [0, 16])
def test_plain_rows(dtype: str, rope: int) -> None:
    call = problem(replace(SMALL, rope=rope), LENGTHS, dtype=dtype)
    model = operator(call, dtype)
    add_body(model)
    found = run(model, feeds_of(call))
    out, cache, _ = expected(call)
    assert np.abs(found["out"].astype(np.float64) - out).max() < CODED_TOLERANCE[dtype]
    # bf16 comes back widened, which is exact.
    assert same_bytes(found["cache_out"].astype(cache.dtype), cache)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_the_body_for_tensorrt(dtype: str) -> None:
    """Equal where a token is valid; padding is written too, behind the row's length."""
    call = problem(SMALL, [(0, 1), (1, 2), (22, 2), (7, 0)])
    clean = {name: np.nan_to_num(array) for name, array in feeds_of(call).items()}
    model = operator(call, "fp16")
    if dtype == "fp32":
        for value in (*model.graph.inputs[:3], *model.graph.outputs):
            value.dtype = ir.DataType.FLOAT
        clean |= {n: clean[n].astype(np.float32) for n in ("query", "new_row", "cache")}
    model.graph.opset_imports[""] = 24
    add_tensorrt_body(model, ir.DataType.FLOAT16 if dtype == "fp16" else ir.DataType.FLOAT)
    found = run(model, clean)
    out, cache, _ = expected(call)
    # fp16 products round the scaled query and the scores as well.
    tolerance = 2 * CODED_TOLERANCE["fp16"] if dtype == "fp16" else graphs.TOLERANCE["fp32"]
    assert np.abs(found["out"].astype(np.float64) - out).max() < tolerance
    for b, (past, new) in enumerate([(0, 1), (1, 2), (22, 2), (7, 0)]):
        held = found["cache_out"][b, 0, : past + new]
        assert np.array_equal(held, cache[b, 0, : past + new].astype(held.dtype))
    model.graph.opset_imports[""] = 23
    with pytest.raises(MlaDeployError, match="REW-OPSET"):
        add_tensorrt_body(model, ir.DataType.FLOAT16)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_the_body_for_tensorrt_before_tensor_scatter(dtype: str) -> None:
    """Opset 20: what is stored is the new rows, to the byte, and no padding."""
    call = problem(SMALL, LENGTHS)
    clean = {name: np.nan_to_num(array) for name, array in feeds_of(call).items()}
    model = operator(call, "fp16")
    if dtype == "fp32":
        for value in (*model.graph.inputs[:3], *model.graph.outputs):
            value.dtype = ir.DataType.FLOAT
        clean |= {n: clean[n].astype(np.float32) for n in ("query", "new_row", "cache")}
    model.graph.opset_imports[""] = 20
    kept = ir.DataType.FLOAT16 if dtype == "fp16" else ir.DataType.FLOAT
    add_tensorrt_body(model, kept, in_place=False)
    found = run(model, clean)
    out, cache, _ = expected(call)
    tolerance = 2 * CODED_TOLERANCE["fp16"] if dtype == "fp16" else graphs.TOLERANCE["fp32"]
    assert np.abs(found["out"].astype(np.float64) - out).max() < tolerance
    wanted = np.nan_to_num(cache.astype(np.float32))
    assert np.array_equal(found["cache_out"].astype(np.float32), wanted)
    model.graph.opset_imports[""] = 19
    with pytest.raises(MlaDeployError, match="REW-OPSET"):
        add_tensorrt_body(model, kept, in_place=False)


def test_plain_rows_of_fp32_are_exact() -> None:
    """With no rounding in between, the formula itself: scale, mask, slice, padding."""
    call = problem(SMALL, LENGTHS)
    wide = replace(
        call, query_BSHE=call.query_BSHE.astype(np.float32),
        new_row_BSE=call.new_row_BSE.astype(np.float32),
        cache_B1ME=call.cache_B1ME.astype(np.float32),
    )  # fmt: skip
    model = operator(call, "fp16")
    for value in (*model.graph.inputs[:3], *model.graph.outputs):
        value.dtype = ir.DataType.FLOAT
    add_body(model)
    out, cache, _ = expected(wide)
    found = run(model, feeds_of(wide))
    assert np.abs(found["out"] - out).max() < graphs.TOLERANCE["fp32"]
    assert np.array_equal(found["cache_out"], cache, equal_nan=True)
    shorter = np.maximum(wide.cache_lengths_B - 1, 0)
    wrong = run(model, feeds_of(replace(wide, cache_lengths_B=shorter)))
    assert np.abs(wrong["out"] - out).max() > 1e-2


@pytest.mark.parametrize("tile", [32, 8])
@pytest.mark.parametrize("storage", CACHES)
def test_coded_rows(storage: str, tile: int) -> None:
    """Codes and scales bit for bit; the dtype of the query is left to the plain rows."""
    call = problem(SMALL, LENGTHS, storage="plain")
    latent = (call.latent, tile, 8)
    rows = np.nan_to_num(call.cache_B1ME.astype(np.float64))
    codes, scales = coded(rows, storage, latent)
    stale = np.arange(24) >= call.cache_lengths_B[:, None]
    scales[stale[:, None]] = np.nan
    call = replace(
        call, storage=storage, tile=tile, rope_tile=8, cache_B1ME=codes, scales_B1MG=scales
    )
    model = operator(call, "fp16")
    add_body(model, storage)
    feeds = feeds_of(call)
    if storage == "fp8":
        feeds["cache"] = codes.view(ml_dtypes.float8_e4m3fn)
    found = run(model, feeds)
    out, cache, after = expected(call)
    assert np.abs(found["out"].astype(np.float64) - out).max() < CODED_TOLERANCE["fp16"]
    after_codes = found["cache_out"].view(cache.dtype)
    if storage == "fp8":
        # Codes go through fp32: a NaN that was never written may lose its sign.
        after_codes, cache = (np.where(c & 127 == 127, 127, c) for c in (after_codes, cache))
    assert np.array_equal(after_codes, cache)
    assert same_bytes(found["scales_out"], after)


_PLAN = "Gather Gather Squeeze Where Add Slice Squeeze Add Where"
FORMS: dict[str, dict[str, Any]] = {
    "rows with a rope key": {"rope": 16},
    "rows without one": {"rope": 0},
}


def layer(dtype: str = "fp16", **form: Any) -> ir.Model:
    """A layer as traced, its widths multiples of 16 as the kernels ask."""
    return parsed(attention_text(dtype, **form))


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "L", 16)


def fired(model: ir.Model, *, lowered: bool = False) -> tuple[ir.Model, int]:
    after = model.clone()
    apply_rules(after, absorb.RULES)
    count = sum(apply_rules(after, mla_decode.rules(16)).values())
    if lowered:
        apply_rules(after, [*lower_attention.RULES, lower_cache.rule(False), lower_cache.READ])
    return after, count


@pytest.mark.parametrize("name", FORMS)
def test_fires(name: str) -> None:
    after, count = fired(layer(**FORMS[name]))
    assert count == 1
    types = op_types(after)
    assert "CacheUpdate" not in types and "LatentAttention" not in types
    joined = "Concat " if FORMS[name]["rope"] else ""
    assert f"{joined}Transpose {_PLAN} Cast Squeeze Cast MlaDecode Cast" in types
    (node,) = (n for n in after.graph if n.op_type == "MlaDecode")
    given = {name: value.value for name, value in node.attributes.items()}
    assert given == {
        "scale": pytest.approx(graphs.SCALE), "latent": 16, "storage": "plain", "tile": 16,
        "rope_tile": max(FORMS[name]["rope"], 1), "multiprocessors": 16,
        "plugin_namespace": "mla_deploy", "plugin_version": "1",
    }  # fmt: skip


STEPS: dict[str, tuple[list[int], list[int], int, int]] = {
    "padded, full and idle": graphs.LENGTHS,
    "one new token each": ([3, 7, 1], [1, 1, 1], 1, 8),
    "from nothing, one row idle": ([0, 0, 5], [3, 1, 0], 3, 6),
}


@pytest.mark.parametrize("dtype", graphs.TOLERANCE)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", FORMS)
def test_numbers(name: str, step: str, dtype: str) -> None:
    """Equal to the layer before it where a token is valid, and in every byte of the cache."""
    before = layer(dtype, **FORMS[name])
    after, count = fired(before)
    assert count == 1
    add_body(after)
    feeds = attention_feeds(dtype, lengths=STEPS[step], seed=3, **FORMS[name])
    # The operator takes the query in the cache's dtype: give both sides what it sees.
    feeds["new_rows"] = feeds["new_rows"].astype(graphs.STORED[dtype][1]).astype(np.float32)
    found, wanted = run(after, feeds), run(before, feeds)
    _, new, width, _ = STEPS[step]
    valid_BS = np.arange(width) < np.array(new)[:, None]
    difference = np.abs(found["out"] - wanted["out"]).max(axis=(1, 3))
    # Several roundings to the cache's dtype instead of one.
    assert difference[valid_BS].max() < 4 * graphs.TOLERANCE[dtype]
    assert graphs.distance(found, wanted, ["cache0_out"]) == 0.0


@pytest.mark.parametrize("step", STEPS)
def test_the_body_for_tensorrt_keeps_the_tokens_of_every_row(step: str) -> None:
    """It writes padding, of idle rows too: behind what they hold. Rows reach 8 slots."""
    cached, new, width, rows = STEPS[step]
    lengths = (cached, new, width, rows + width)
    before = layer("fp32", rope=16)
    before.graph.opset_imports[""] = 24
    after, count = fired(before)
    assert count == 1
    add_tensorrt_body(after, ir.DataType.FLOAT)
    feeds = attention_feeds(lengths=lengths, seed=4, rope=16)
    wanted = run(before, feeds)
    feeds["cache0"] = np.nan_to_num(feeds["cache0"])
    found = run(after, feeds)
    for b, (past, count) in enumerate(zip(cached, new, strict=True)):
        held = slice(0, past + count)
        assert np.array_equal(found["cache0_out"][b, 0, held], wanted["cache0_out"][b, 0, held])
        difference = np.abs(found["out"] - wanted["out"])[b, :, :count]
        assert difference.size == 0 or difference.max() < graphs.TOLERANCE["fp32"]


def test_a_body_may_be_in_a_layer_s_function() -> None:
    """Where an exported graph has it: one call for each layer, and the operator inside."""
    after, _ = fired(layer(rope=16))
    add_body(after)
    add_bodies(after)
    names = {function.name for function in after.functions.values()}
    assert {"MlaDecode", "SplitHeads"} <= names


MISSES: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "sinks": ({"sinks": True}, ("", "")),
    "a choice of tokens": ({"count": 3}, ("", "")),
    "a split row": ({"split": True}, ("", "")),
    "a growing cache": ({"growing": True}, ("", "")),
    "rows of another layer": ({"shared": True}, ("", "")),
    "a mask of the layer's own": (
        {}, ("(query, key, value, visible)", "(query, key, value, mine)")
    ),
    "rows that are read elsewhere too": ({}, ("bool all_visible", "bool all_visible")),
    "a rope key before the latent": (
        {}, ("latent = Slice (rows, first, rank, axis)", "latent = Slice (rows, rank, last, axis)")
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISSES)
def test_near_miss(name: str) -> None:
    form, (old, new) = MISSES[name]
    text = attention_text("fp16", **{"rope": 16, **form})
    assert old in text
    text = text.replace(old, new)
    if "mine" in new:
        text = text.replace("first = Constant", "mine = Not (visible)\n        first = Constant")
    if "elsewhere" in name:
        text = text.replace("] out,", "] out, float[batch,1,total,32] copied,")
        text = text.replace("out = mla_deploy.Att", "copied = Neg (rows)\n    out = mla_deploy.Att")
    before = parsed(text)
    absorbed = before.clone()
    apply_rules(absorbed, absorb.RULES)
    after, count = fired(before)
    assert (count, op_types(after)) == (0, op_types(absorbed))


@pytest.mark.parametrize(("latent", "rope"), [(16, 2), (24, 16), (528, 16), (512, 80)])
def test_widths_without_a_kernel_are_left_alone(
    latent: int, rope: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "L", latent)
    assert fired(layer(rope=rope))[1] == 0
    monkeypatch.setattr(graphs, "L", 512)
    assert fired(layer(rope=64))[1] == 1


def test_nodes_of_another_storage_are_refused() -> None:
    call = problem(SMALL, LENGTHS)
    with pytest.raises(MlaDeployError, match="REW-STORAGE"):
        add_body(operator(call, "fp16"), "int8")
    with pytest.raises(MlaDeployError, match="REW-STORAGE"):
        add_body(operator(call, "fp16", storage="int4"), "int4")


def test_an_old_opset_is_refused() -> None:
    model = operator(problem(SMALL, LENGTHS), "fp16")
    model.graph.opset_imports[""] = 19
    with pytest.raises(MlaDeployError, match="REW-OPSET"):
        add_body(model)
