"""Latents as codes and scales: sizes, what comes back, what is refused."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from mla_deploy.errors import InputError
from mla_deploy.latent_store import STORES, find_store, rows_dtype
from mla_deploy.source.latent_values import decode, e4m3_values, encode, rounded

RANK = 512
ROWS = np.random.default_rng(0).standard_normal((5, RANK)).astype(np.float32)
# Bytes of a row, scales among them; relative error of normal rows (facts: int8 0.5 to 0.7 %, fp8
# 2.4 to 2.6 %, int4 of 32 9.7 to 13 %, wider tiles more).
EXPECTED = {
    "int8": (512 + 4, 1e-2),
    "int8-tile": (512 + 16, 8e-3),
    "int4": (256 + 8, 2e-1),
    "fp8": (512 + 16, 3e-2),
}


@pytest.mark.parametrize("name", STORES)
def test_bytes_and_error(name: str) -> None:
    store = STORES[name]
    codes, scales = encode(ROWS, store)
    wanted_bytes, most = EXPECTED[name]
    assert (codes[0].nbytes + scales[0].nbytes, store.row_bytes(RANK)) == (wanted_bytes,) * 2
    found = decode(codes, scales, store)
    error = np.linalg.norm(found - ROWS) / np.linalg.norm(ROWS)
    assert most / 4 < error < most


@pytest.mark.parametrize("name", STORES)
def test_what_was_rounded_once_stays_as_it_is(name: str) -> None:
    once = rounded(ROWS, STORES[name])
    np.testing.assert_allclose(rounded(once, STORES[name]), once, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", STORES)
def test_zeros_stay_zeros(name: str) -> None:
    zeros = np.zeros((2, 256), np.float32)
    np.testing.assert_array_equal(rounded(zeros, STORES[name]), zeros)


@pytest.mark.parametrize("rank", [64, 96, 320])
def test_a_width_that_128_does_not_divide_is_one_tile(rank: int) -> None:
    assert STORES["int8-tile"].tiles(rank) == 1
    assert STORES["fp8"].tiles(rank) == 1


def test_e4m3_is_that_of_ml_dtypes() -> None:
    """Each code's value, and each number's nearest code, halves to even."""
    finite = np.array([code for code in range(256) if code & 127 != 127], np.uint8)
    wanted = finite.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(e4m3_values()[finite], wanted)
    ties = (wanted[1:] + wanted[:-1]) / 2
    numbers = np.concatenate([wanted, ties, ROWS.ravel() * 100]).astype(np.float32)
    numbers = numbers[np.abs(numbers) <= 448]
    # The first value makes the scale one; an odd number of values is one tile.
    row = np.concatenate([[np.float32(448)], numbers, [np.float32(0)] * (1 - numbers.size % 2)])
    codes, scales = encode(row[None], STORES["fp8"])
    assert scales.tolist() == [[1.0]]
    found = codes[0].view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    expected = row.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(found, expected)


def test_an_odd_rank_is_not_packed() -> None:
    with pytest.raises(InputError, match="EXP-CACHE"):
        STORES["int4"].columns(65)


def test_an_unknown_store_is_named() -> None:
    with pytest.raises(InputError, match="EXP-CACHE"):
        find_store("int2")


def test_rows_beside_codes_take_sixteen_bits() -> None:
    assert rows_dtype("fp32", "fp32") == "fp32"
    assert rows_dtype("int8", "fp32") == "fp16"
    assert rows_dtype("int8", "bf16") == "bf16"
