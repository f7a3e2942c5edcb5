"""Latents as codes and scales: sizes, what comes back, what is refused."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from mla_deploy.errors import InputError
from mla_deploy.latent_store import ROPE_KEYS, STORES, LatentStore, find_store, rows_dtype
from mla_deploy.source.latent_values import decode, e4m3_values, encode, rounded

RANK = 512
ROWS = np.random.default_rng(0).standard_normal((5, RANK)).astype(np.float32)
# Bytes of a row, scales among them; relative error of normal rows (facts: int8 0.5 to 0.7 %, fp8
# 2.4 to 2.6 %, int4 of 32 9.7 to 13 %, wider tiles more).
EXPECTED = {
    "int8": (512 + 4, 1e-2),
    "int8-tile": (512 + 16, 8e-3),
    "int8-all": (512 + 2, 1e-2),
    "int4": (256 + 8, 2e-1),
    "int4-all": (256 + 4, 2e-1),
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


KEEPS_ROPE = [name for name, store in STORES.items() if store.rope_key is not None]


@pytest.mark.parametrize(("name", "wanted"), [("int8-all", 398), ("int4-all", 304)])
def test_a_token_of_the_exact_form_of_smollm2(name: str, wanted: int) -> None:
    """Latent and rope key of 192 values each: of 768 bytes 51.8 % and 39.6 %."""
    store = STORES[name]
    assert store.row_bytes(192, 192) == wanted
    stored = [*encode(ROWS[:1, :192], store), *encode(ROWS[:1, 192:384], ROPE_KEYS)]
    assert sum(part.nbytes for part in stored) == wanted


def test_a_rope_key_of_sixteen_bits_is_counted_too() -> None:
    assert STORES["int8"].row_bytes(512, 64) == 512 + 4 + 128
    assert STORES["int8-all"].row_bytes(512, 0) == 512 + 2


@pytest.mark.parametrize(
    ("rope", "tiles"), [(192, 6), (64, 2), (32, 1), (8, 1), (48, 2), (40, 2), (34, 2), (74, 1)]
)
def test_tiles_of_a_rope_key(rope: int, tiles: int) -> None:
    assert ROPE_KEYS.tiles(rope) == tiles


def test_a_loud_pair_leaves_the_other_tiles_theirs() -> None:
    """One scale a row would round values of 0.01 beside one of 100 to nothing."""
    keys = ROWS[:, :192] * np.float32(1e-2)
    keys[:, 0] = 100.0
    found = rounded(keys, ROPE_KEYS)
    error = np.abs(found - keys)[:, 32:].max()
    assert 0 < error < 0.01 * np.abs(keys[:, 32:]).max()


def _names(store: LatentStore) -> str:
    return store.name


HALF_SCALES = [*(STORES[name] for name in KEEPS_ROPE), ROPE_KEYS]


@pytest.mark.parametrize("size", [1e-30, 1e-7, 1e-4, 1e-2, 1.0, 6e4])
@pytest.mark.parametrize("store", HALF_SCALES, ids=_names)
def test_half_scales_keep_every_code_in_its_range(store: LatentStore, size: float) -> None:
    """A scale that was rounded down would let the largest value of a tile run over."""
    rows = (ROWS / np.abs(ROWS).max() * size).astype(np.float32)
    codes, scales = encode(rows, store)
    assert scales.dtype == np.float16 and np.isfinite(scales).all() and scales.min() > 0
    parts = (codes & 15, codes >> 4) if store.bits == 4 else (codes,)
    assert all(p.min() >= 1 and p.max() <= store.zero + store.steps for p in parts)
    tiles = (len(rows), store.tiles(RANK), -1)
    error = np.abs(decode(codes, scales, store) - rows).reshape(tiles).max(axis=-1)
    # Half a step, the rounding of a value that the scale makes a hair more than `steps` beside it.
    assert (error <= 0.51 * scales.astype(np.float32)).all()


def test_what_no_half_holds_is_no_number_when_read() -> None:
    """As it would be in a cache of fp16: never a wrong value."""
    with np.errstate(invalid="ignore"):
        assert np.isnan(rounded(np.full((1, 32), 1e7, np.float32), STORES["int8-all"])).all()


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


@pytest.mark.parametrize(("name", "other"), [("int4", "int8"), ("int4-all", "int8-all")])
def test_an_odd_rank_is_not_packed(name: str, other: str) -> None:
    with pytest.raises(InputError, match="EXP-CACHE") as refusal:
        STORES[name].columns(65)
    assert str(refusal.value.hint).endswith(f"as {other}")


def test_an_unknown_store_is_named() -> None:
    with pytest.raises(InputError, match="EXP-CACHE"):
        find_store("int2")
    assert find_store(ROPE_KEYS.name) is ROPE_KEYS  # what graphs name, not what a user chooses
    assert ROPE_KEYS.name not in STORES


def test_rows_beside_codes_take_sixteen_bits() -> None:
    assert rows_dtype("fp32", "fp32") == "fp32"
    assert rows_dtype("int8", "fp32") == "fp16"
    assert rows_dtype("int8", "bf16") == "bf16"
