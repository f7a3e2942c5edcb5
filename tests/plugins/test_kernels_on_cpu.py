"""The CUDA kernels' own source, compiled for a CPU, against numpy float64.

What this shows: every index, mask, scale and sum of append, attend and join, the lanes that PTX's
matrix instructions are given, and that the result does not hang on the order of warps or on when a
copy to shared memory happens. What it cannot: that a device does the same. None was at hand.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from plugins.mla_decode.device_calls import STORAGES, Sizes, sizes_of
from plugins.mla_decode.reference import (
    CASES,
    DTYPES,
    TOLERANCE,
    Shape,
    expected,
    problem,
    same_bytes,
)
from tests.plugins.host import Order, Step, run


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_numbers(host_kernels: ctypes.CDLL, name: str, dtype: str, storage: str) -> None:
    """Slots never written hold NaN (coded: any byte, NaN scales), and so do padding and scratch."""
    shape, lengths = CASES[name]
    call = problem(shape, lengths, dtype=dtype, storage=storage)
    wanted, cache, scales = expected(call)
    found, after, splits = run(host_kernels, call, dtype, blocks=64)
    assert np.abs(found.astype(np.float64) - wanted).max() < TOLERANCE[dtype]
    assert same_bytes(after.cache_B1ME, cache)
    assert same_bytes(after.scales_B1MG, scales)
    assert splits == {512: 4, 300: 2, 64: 1}.get(shape.capacity, 2)


def test_a_row_without_a_rope_key(host_kernels: ctypes.CDLL) -> None:
    call = problem(Shape(heads=5, latent=64, rope=0, new=2), [(40, 2), (0, 1)])
    found, after, _ = run(host_kernels, call, "fp16")
    wanted, cache, _ = expected(call)
    assert np.abs(found.astype(np.float64) - wanted).max() < TOLERANCE["fp16"]
    assert same_bytes(after.cache_B1ME, cache)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("heads", [5, 24])
def test_order_of_warps_and_time_of_copies_change_nothing(
    host_kernels: ctypes.CDLL, heads: int, storage: str
) -> None:
    """A barrier that is missing, or a stage read before it is there, shows as other bits."""
    shape = Shape(heads=heads, capacity=256)
    call = problem(shape, [(200, 1), (67, 1), (0, 1)], storage=storage)
    orders = (Order(reversed=True), Order(late=True), Order(reversed=True, late=True))
    plain, *others = (
        run(host_kernels, call, "fp16", order=order)[0] for order in (Order(), *orders)
    )
    assert all(same_bytes(other, plain) for other in others)


def test_splits_change_the_sum_s_order_only(host_kernels: ctypes.CDLL) -> None:
    call = problem(Shape(heads=5, capacity=512), [(500, 1), (3, 1)])
    found = {blocks: run(host_kernels, call, "fp16", blocks=blocks) for blocks in (1, 4, 64)}
    assert [found[blocks][2] for blocks in found] == [1, 2, 8]
    wanted, _, _ = expected(call)
    for out, _, _ in found.values():
        assert np.abs(out.astype(np.float64) - wanted).max() < TOLERANCE["fp16"]


@pytest.mark.parametrize("lengths", [(-3, 1), (95, 4), (200, 1), (96, 1), (0, 9)])
def test_lengths_that_cannot_be_stay_inside_the_cache(
    host_kernels: ctypes.CDLL, lengths: tuple[int, int]
) -> None:
    """A caller is asked not to; rows around the wrong one are as they were."""
    call = problem(Shape(heads=5, new=4), [(10, 1), (20, 2), (30, 1)])
    call.cache_lengths_B[1], call.new_lengths_B[1] = lengths
    call.new_row_BSE[1] = 1.0
    call.query_BSHE[1] = 1.0
    _, after, _ = run(host_kernels, call, "fp16")
    _, cache, _ = expected(problem(Shape(heads=5, new=4), [(10, 1), (20, 2), (30, 1)]))
    for row in (0, 2):
        assert same_bytes(after.cache_B1ME[row], cache[row])


def test_a_huge_score_is_no_overflow(host_kernels: ctypes.CDLL) -> None:
    """exp of a score of thousands: the running maximum is what keeps it finite."""
    call = problem(Shape(heads=5), [(60, 1)])
    call.query_BSHE[:] = call.query_BSHE * 100
    found, _, _ = run(host_kernels, call, "fp16")
    assert np.isfinite(found.astype(np.float64)).all()
    # The share that is left for the largest score is 1: its row itself comes out.
    wanted, _, _ = expected(call)
    assert np.abs(found.astype(np.float64) - wanted).max() < TOLERANCE["fp16"]


@pytest.mark.parametrize(
    ("latent", "rope", "tile", "rope_tile", "new"),
    [(520, 64, 520, 64, 1), (512, 80, 512, 80, 1), (24, 16, 24, 16, 1), (512, 64, 512, 64, 9),
     (512, 64, 100, 32, 1), (512, 64, 128, 48, 1), (512, 64, 0, 32, 1)],
)  # fmt: skip
def test_sizes_without_a_kernel_are_refused(
    host_kernels: ctypes.CDLL, latent: int, rope: int, tile: int, rope_tile: int, new: int
) -> None:
    call = problem(Shape(heads=5, new=1), [(1, 1)], storage="int8")
    sizes = sizes_of(call)
    sizes.latent, sizes.rope, sizes.tile, sizes.rope_tile = latent, rope, tile, rope_tile
    sizes.new_tokens = new
    step = Step(*[None] * 9, sizes, 1.0)
    assert host_kernels.mla_decode_on_host(ctypes.byref(step), 0, 1, 4, 0, 0) == 1


def test_scratch_is_enough_for_every_smaller_call(host_kernels: ctypes.CDLL) -> None:
    """A plan reserves scratch for its largest call; a smaller one may be split more finely."""

    def scratch(batch: int, new: int, heads: int, capacity: int, blocks: int) -> tuple[int, int]:
        sizes = Sizes(batch, new, heads, capacity, 512, 64, 512, 64, 0)
        needed, reserved = ctypes.c_uint64(), ctypes.c_uint64()
        host_kernels.mla_decode_scratch(
            ctypes.byref(sizes), blocks, ctypes.byref(needed), ctypes.byref(reserved)
        )
        return needed.value, reserved.value

    for blocks in (1, 16, 132):
        for heads, capacity in ((5, 4096), (16, 128), (128, 32768)):
            reserved = scratch(8, 8, heads, capacity, blocks)[1]
            for batch in range(1, 9):
                for new in range(1, 9):
                    assert scratch(batch, new, heads, capacity, blocks)[0] <= reserved
    # One row, 16 heads, 32k: 16 splits of 16 rows of 513 floats.
    assert scratch(1, 1, 16, 32768, 16)[0] == 4 * 16 * 16 * 513
