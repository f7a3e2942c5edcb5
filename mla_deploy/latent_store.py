"""How a latent is stored in fewer bits: codes in bytes, and one scale for each tile of a row.

    int8        code = round(x / scale) + 128, one scale a row       scale = largest |x| / 127
    int8-tile   the same, one scale for each 128 values
    int4        code = round(x / scale) + 8, two in a byte: the first half of the row in the low
                bits, the second in the high ones; one scale a half  scale = largest |x| / 7
    fp8         the bits of an e4m3 number, x / scale rounded to it; one scale for each 128 values,
                as DeepSeek-V3.2 caches its latent                   scale = largest |x| / 448

Codes are unsigned because that is the order of types ONNX Runtime multiplies exactly and fastest.
A width that 128 does not divide is one tile. Here is numpy's arithmetic; graphs do the same
(`rewrite/latent_codes.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_deploy.errors import InputError, quoted

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]

# A row of zeros has a scale all the same: nothing is divided by zero.
TINY = 1e-30
_TILE = 128


@dataclass(frozen=True)
class LatentStore:
    """One row of the table above. `steps`: how many scales the largest value of a tile is."""

    name: str
    steps: int
    zero: int  # what is stored for 0
    bits: int
    is_tiled: bool

    def columns(self, rank: int) -> int:
        """Bytes of the codes of one row. Raises: InputError EXP-CACHE (int4 of an odd rank)."""
        if self.bits == 8:
            return rank
        if rank % 2:
            raise InputError(
                "EXP-CACHE",
                f"the latent has {rank} values; {self.name} stores two in a byte and wants an even "
                "number",
                hint="store the cache as int8",
            )
        return rank // 2

    def tiles(self, rank: int) -> int:
        """Scales of one row."""
        if self.bits == 4:
            return 2
        return rank // _TILE if self.is_tiled and rank % _TILE == 0 else 1

    def row_bytes(self, rank: int) -> int:
        """Bytes of one latent row: codes and fp32 scales."""
        return self.columns(rank) + 4 * self.tiles(rank)


STORES = {
    "int8": LatentStore("int8", steps=127, zero=128, bits=8, is_tiled=False),
    "int8-tile": LatentStore("int8-tile", steps=127, zero=128, bits=8, is_tiled=True),
    "int4": LatentStore("int4", steps=7, zero=8, bits=4, is_tiled=True),
    "fp8": LatentStore("fp8", steps=448, zero=0, bits=8, is_tiled=True),
}


def find_store(name: str) -> LatentStore:
    """Raises: InputError EXP-CACHE."""
    if name not in STORES:
        raise InputError(
            "EXP-CACHE", f"a latent is stored as {quoted(name)}; wanted one of {', '.join(STORES)}"
        )
    return STORES[name]


def rows_dtype(cache_dtype: str, dtype: str) -> str:
    """The dtype of cached rows that are no codes; beside codes they take 16 bits.

    `dtype` is that of the weights: it says which 16.
    """
    if cache_dtype not in STORES:
        return cache_dtype
    return "bf16" if dtype == "bf16" else "fp16"


def encode(rows: Floats, store: LatentStore) -> tuple[Codes, Floats]:
    """[..., L] -> codes [..., columns] and scales [..., tiles]."""
    rank = rows.shape[-1]
    tiled = rows.reshape(*rows.shape[:-1], store.tiles(rank), -1)
    peaks = np.abs(tiled).max(axis=-1)
    scales = (np.maximum(peaks, np.float32(TINY)) / np.float32(store.steps)).astype(np.float32)
    ratios = (tiled / scales[..., None]).reshape(rows.shape)
    if store.name == "fp8":
        return _e4m3_codes(ratios), scales
    codes = (np.rint(ratios) + np.float32(store.zero)).astype(np.uint8)
    if store.bits == 4:
        low, high = np.split(codes, 2, axis=-1)
        codes = low | (high << 4)
    return codes, scales


def decode(codes: Codes, scales: Floats, store: LatentStore) -> Floats:
    """codes [..., columns], scales [..., tiles] -> [..., L]."""
    if store.name == "fp8":
        values = e4m3_values()[codes]
    else:
        if store.bits == 4:
            codes = np.concatenate((codes & 15, codes >> 4), axis=-1)
        values = codes.astype(np.float32) - np.float32(store.zero)
    tiled = values.reshape(*values.shape[:-1], scales.shape[-1], -1)
    rows: Floats = (tiled * scales[..., None]).reshape(values.shape)
    return rows


def rounded(rows: Floats, store: LatentStore) -> Floats:
    """What is read back of `rows` once they are stored."""
    return decode(*encode(rows, store), store)


def e4m3_values() -> Floats:
    """The value of each of the 256 codes (OCP FP8, e4m3fn).

    The two that are NaN there are never written; in a stale slot they read as zero.
    """
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    normal = (8 + mantissa) * np.exp2(exponent - 10.0)
    values = np.where(exponent == 0, mantissa * 2.0**-9, normal)
    values = np.where((codes & 127) == 127, 0.0, values)
    return np.where(codes & 128, -values, values).astype(np.float32)


def _e4m3_codes(ratios: Floats) -> Codes:
    """Round to the nearest e4m3 number, halves to even; a tile's largest value is 448."""
    size = np.minimum(np.abs(ratios), np.float32(448))
    exponent = np.where(size > 0, np.maximum(np.frexp(size)[1] - 1, -6), -6)
    # Steps of this binade, of which a normal number has 8 to 16; the next one begins at 16.
    steps = np.rint(np.ldexp(size, 3 - exponent))
    codes = (exponent + 6) * 8 + steps
    return np.where(np.signbit(ratios), codes + 128, codes).astype(np.uint8)


def manifest_entry(store: LatentStore, rank: int) -> dict[str, Any]:
    """What a bundle's manifest says of its quantised latents."""
    return {"name": store.name, "zero": store.zero, "tiles": store.tiles(rank), "bits": store.bits}
