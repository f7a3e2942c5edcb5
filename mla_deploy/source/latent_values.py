"""The arithmetic of `latent_store.py` in numpy: what is stored of a latent, what is read back."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mla_deploy.latent_store import LatentStore

Floats = NDArray[np.float32]
Scales = NDArray[np.float32] | NDArray[np.float16]
Codes = NDArray[np.uint8]


def encode(rows: Floats, store: LatentStore) -> tuple[Codes, Scales]:
    """[..., L] -> codes [..., columns] and scales [..., tiles] in the dtype that is stored.

    Rope keys are rows of `store.rope_key`.
    """
    rank = rows.shape[-1]
    tiled = rows.reshape(*rows.shape[:-1], store.tiles(rank), -1)
    peaks = np.abs(tiled).max(axis=-1)
    scales = _scales(peaks, store)
    divisors: Floats = scales[..., None].astype(np.float32)
    ratios: Floats = (tiled / divisors).reshape(rows.shape)
    if store.is_float:
        return _e4m3_codes(ratios), scales
    codes = (np.rint(ratios) + np.float32(store.zero)).astype(np.uint8)
    if store.bits == 4:
        low, high = np.split(codes, 2, axis=-1)
        codes = low | (high << 4)
    return codes, scales


def decode(codes: Codes, scales: Scales, store: LatentStore) -> Floats:
    """codes [..., columns], scales [..., tiles] -> [..., L]."""
    if store.is_float:
        values = e4m3_values()[codes]
    else:
        if store.bits == 4:
            codes = np.concatenate((codes & 15, codes >> 4), axis=-1)
        values = codes.astype(np.float32) - np.float32(store.zero)
    tiles = scales.shape[-1]  # the size of one is spelled out: there may be no rows to tell it by
    tiled = values.reshape(*values.shape[:-1], tiles, values.shape[-1] // tiles)
    rows: Floats = (tiled * scales[..., None].astype(np.float32)).reshape(values.shape)
    return rows


def rounded(rows: Floats, store: LatentStore) -> Floats:
    """What is read back of `rows` once they are stored."""
    return decode(*encode(rows, store), store)


def _scales(peaks: Floats, store: LatentStore) -> Scales:
    least = np.float32(store.least_scale)
    if store.scale_dtype == "fp32":
        return (np.maximum(peaks, least) / np.float32(store.steps)).astype(np.float32)
    with np.errstate(over="ignore"):  # infinite then, as a row kept in fp16 would be
        return np.maximum(peaks / np.float32(store.steps), least).astype(np.float16)


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
