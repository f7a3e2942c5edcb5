"""The latent cache without a graph: bytes, windows, moving rows apart."""

from __future__ import annotations

import numpy as np
import pytest

from mla_deploy.errors import EnvironmentFailure, IncompatibleError, InputError
from mla_deploy.runtime.cache import GrowingCache, InPlaceCache, open_cache
from mla_deploy.runtime.cache_spec import (
    CacheSpec,
    CacheTensor,
    as_float32,
    spec_from_manifest,
)
from tests.small_bundle import manifest

LAYERS, LATENT, ROPE = 3, 6, 4


def spec(layout: str = "fused", dtype: str = "fp32", grows: bool = False) -> CacheSpec:
    parts = (("latent_cache", LATENT), ("rope_key_cache", ROPE))
    if layout == "fused":
        parts = (("latent_cache", LATENT + ROPE),)
    tensors = tuple(
        CacheTensor(layer, name, f"{name}.{layer}", f"{name}_out.{layer}", (width,), dtype)
        for layer in range(LAYERS)
        for name, width in parts
    )
    return CacheSpec(tensors, dtype, grows)


def filled(cache: InPlaceCache, lengths_B: np.ndarray) -> list[list[np.ndarray]]:
    """Write rows of known values through windows, a few tokens at a time; what was written."""
    rng = np.random.default_rng(0)
    now_B = np.zeros_like(lengths_B)
    wanted = [
        [np.empty((length, LATENT + ROPE), np.float32) for length in lengths_B]
        for _ in range(LAYERS)
    ]
    while (now_B < lengths_B).any():
        new_B = np.minimum(lengths_B - now_B, rng.integers(0, 40, len(lengths_B)))
        if not new_B.any():
            continue
        window = cache.window(now_B, new_B, int(new_B.max()))
        for view, tensor in zip(window.outputs, cache.spec.tensors, strict=True):
            at = LATENT if tensor.input.startswith("rope") else 0
            for row, (start, new) in enumerate(zip(now_B, new_B, strict=True)):
                values = rng.standard_normal((new, tensor.width)).astype(np.float32)
                view[row, 0, start : start + new] = values
                wanted[tensor.layer][row][start : start + new, at : at + tensor.width] = values
        cache.accept(window)
        now_B = now_B + new_B
    return wanted


@pytest.mark.parametrize(("dtype", "itemsize"), [("fp32", 4), ("fp16", 2), ("bf16", 2)])
@pytest.mark.parametrize("layout", ["fused", "split"])
def test_bytes_are_the_formula(layout: str, dtype: str, itemsize: int) -> None:
    cache = InPlaceCache(spec(layout, dtype), batch=5, capacity=37)
    assert cache.bytes == LAYERS * 5 * 37 * (LATENT + ROPE) * itemsize


def test_one_row_is_bound_as_its_exact_prefix() -> None:
    cache = InPlaceCache(spec(), batch=1, capacity=50)
    window = cache.window(np.array([7]), np.array([3]), 3)
    assert [view.shape for view in window.inputs] == [(1, 1, 10, LATENT + ROPE)] * LAYERS
    assert all(a is b for a, b in zip(window.inputs, window.outputs, strict=True))
    longer = cache.window(np.array([10]), np.array([1]), 1)
    assert longer.inputs[0].ctypes.data == window.inputs[0].ctypes.data


@pytest.mark.parametrize("layout", ["fused", "split"])
@pytest.mark.parametrize("lengths", [(90, 1, 200), (1, 1, 1), (300, 299, 298), (0, 310, 5, 64)])
def test_rows_survive_every_move(layout: str, lengths: tuple[int, ...]) -> None:
    lengths_B = np.array(lengths)
    cache = InPlaceCache(spec(layout), batch=len(lengths), capacity=310)
    wanted = filled(cache, lengths_B)
    for layer in range(LAYERS):
        for row, length in enumerate(lengths):
            np.testing.assert_array_equal(cache.cached_rows(layer, row, length), wanted[layer][row])


def test_a_window_never_exceeds_the_buffer() -> None:
    cache = InPlaceCache(spec(), batch=3, capacity=70)
    window = cache.window(np.array([0, 0, 0]), np.array([1, 66, 2]), 66)
    assert window.inputs[0].shape == (3, 1, 70, LATENT + ROPE)
    assert window.inputs[0].nbytes * LAYERS == cache.bytes


def test_reset_starts_with_a_narrow_window_again() -> None:
    cache = InPlaceCache(spec(), batch=2, capacity=400)
    cache.window(np.array([0, 0]), np.array([300, 1]), 300)
    cache.reset()
    assert cache.window(np.array([0, 0]), np.array([3, 1]), 3).inputs[0].shape[2] == 64


def test_unused_capacity_takes_no_memory() -> None:
    """Zero pages: a cache of 8 GiB can be reserved where there is not that much."""
    cache = InPlaceCache(spec(), batch=1, capacity=(8 << 30) // (LAYERS * (LATENT + ROPE) * 4))
    assert cache.bytes > 7 << 30


def test_growing_cache_keeps_the_outputs_and_drops_what_no_row_uses() -> None:
    cache = open_cache(spec(grows=True), 2, 100)
    assert isinstance(cache, GrowingCache)
    first = cache.window(np.array([0, 0]), np.array([4, 2]), 4)
    assert first.inputs[0].shape == (2, 1, 0, LATENT + ROPE)
    assert first.outputs[0].shape == (2, 1, 4, LATENT + ROPE)
    first.outputs[0][:] = 7
    cache.accept(first)
    assert cache.bytes == LAYERS * 2 * 4 * (LATENT + ROPE) * 4
    # A refused step put the lengths back: the next window starts from the shorter past.
    second = cache.window(np.array([3, 2]), np.array([1, 1]), 1)
    assert second.inputs[0].shape == (2, 1, 3, LATENT + ROPE)
    assert (second.inputs[0] == 7).all()
    cache.reset()
    assert cache.bytes == 0


def test_bf16_is_the_upper_half_of_fp32() -> None:
    values = np.array([1.0, -2.5, 3.0e38, np.inf], np.float32)
    halves = (values.view(np.uint32) >> 16).astype(np.uint16)
    np.testing.assert_allclose(as_float32(halves, "bf16"), values, rtol=2**-7)


def test_spec_of_a_manifest() -> None:
    found = spec_from_manifest(manifest())
    latent = CacheTensor(0, "latent_cache", "latent_cache.0", "latent_cache_out.0", (24,), "fp32")
    assert found.tensors == (latent,)
    assert (found.bytes(2, 64), found.layers, found.grows) == (2 * 64 * 24 * 4, (0,), False)


def test_unknown_cache_dtype() -> None:
    changed = manifest()
    for value in changed["io"]["decode"]["inputs"]:
        value["dtype"] = "fp8" if value["kind"] == "latent_cache" else value["dtype"]
    with pytest.raises(IncompatibleError, match="RUN-CACHE"):
        spec_from_manifest(changed)


FIXED = CacheSpec(
    (
        CacheTensor(0, "latent_cache", "latent_cache.0", "latent_cache_out.0", (2,), "fp32", 3),
        CacheTensor(1, "conv_state", "conv_state.1", "conv_state_out.1", (2, 4), "fp32",
                    is_state=True),
    ),
    "fp32",
    grows=False,
)  # fmt: skip


@pytest.mark.parametrize("kind", [InPlaceCache, GrowingCache])
def test_rings_and_states_do_not_grow(kind: type) -> None:
    cache = kind(FIXED, batch=2, capacity=50)
    assert cache.bytes == FIXED.bytes(2, 50) == 2 * (3 * 2 + 8) * 4
    window = cache.window(np.array([0, 0]), np.array([5, 1]), 5)
    assert [a.shape for a in window.inputs] == [(2, 1, 3, 2), (2, 2, 4)]
    for array in window.outputs:
        array[:] = 1
    # Until the step is accepted nothing of it counts; a call can go back to where it began.
    assert (cache.cached_rows(1, 0, 5) == 0).all()
    saved = cache.fixed.saved()
    cache.accept(window)
    assert (cache.cached_rows(1, 0, 5) == 1).all()
    assert cache.cached_rows(0, 0, 5).shape == (2, 2) and cache.cached_rows(0, 1, 1).shape == (1, 2)
    cache.fixed.restore(saved)
    assert (cache.cached_rows(1, 0, 5) == 0).all()


def test_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(np, "zeros", refused)
    with pytest.raises(EnvironmentFailure, match="RUN-MEMORY"):
        InPlaceCache(spec(), batch=1, capacity=10)


def test_bytes_beyond_64_bits() -> None:
    with pytest.raises(InputError, match="SHAPE-OVERFLOW"):
        InPlaceCache(spec(), batch=1 << 31, capacity=1 << 31)
