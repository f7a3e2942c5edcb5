"""MlaDecode in numpy float64, token by token: what every backend is held against; and problems.

Nothing here is shared with the code under test: coding is by table and by integer arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
DTYPES: dict[str, Any] = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
# Largest |difference| for outputs below 4: three roundings to the query's type (a coded row when it
# is widened, a share, the output), each of half a unit: 3 * 4 / 2^12 and / 2^9. The one table here.
TOLERANCE = {"fp16": 2.93e-3, "bf16": 2.34e-2}
LARGEST = {"int8": 127.0, "fp8": 448.0}
E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)


@dataclass(frozen=True)
class Problem:
    """One call. `cache_B1ME` is int8 or uint8 (e4m3 bits) where `storage` is coded, with scales."""

    query_BSHE: Array
    new_row_BSE: Array
    cache_B1ME: Array
    cache_lengths_B: Array
    new_lengths_B: Array
    scales_B1MG: Array
    latent: int
    scale: float
    storage: str
    tile: int
    rope_tile: int

    @property
    def rope(self) -> int:
        return int(self.cache_B1ME.shape[-1]) - self.latent

    def copied(self) -> Problem:
        """The same with a cache of its own: backends write to it."""
        return replace(self, cache_B1ME=self.cache_B1ME.copy(), scales_B1MG=self.scales_B1MG.copy())


@dataclass(frozen=True)
class Shape:
    heads: int = 5
    latent: int = 512
    rope: int = 64
    new: int = 1
    capacity: int = 96


# (shape, lengths of each row as (cached, new)); 64 cached tokens are the least of a split.
CASES: dict[str, tuple[Shape, list[tuple[int, int]]]] = {
    "one token, from 0 and 1, full, idle": (
        Shape(heads=5), [(0, 1), (1, 1), (40, 1), (95, 1), (7, 0), (0, 0)]
    ),
    "ragged, four splits": (
        Shape(heads=16, new=3, capacity=512), [(509, 3), (300, 2), (33, 1), (0, 3), (511, 1)]
    ),
    "128 heads, rank 256, rope 32": (
        Shape(heads=128, latent=256, rope=32, new=2, capacity=300), [(298, 2), (130, 1), (0, 2)]
    ),
    "rank 256, rope 64": (Shape(heads=5, latent=256, rope=64, new=2), [(60, 2), (0, 1)]),
    "rank 512, rope 32": (Shape(heads=5, latent=512, rope=32, new=2), [(60, 2), (0, 1)]),
    "eight new tokens": (Shape(heads=5, new=8, capacity=64), [(50, 8), (31, 7), (0, 8), (56, 8)]),
}  # fmt: skip


def problem(
    shape: Shape,
    lengths: list[tuple[int, int]],
    *,
    dtype: str = "fp16",
    storage: str = "plain",
    seed: int = 0,
) -> Problem:
    """Random rows of order one; NaN (or, coded, any byte and NaN scales) in what was never written.

    `lengths`: (cached, new) of each row.
    """
    random = np.random.default_rng(seed)
    kind, batch, wide = DTYPES[dtype], len(lengths), shape.latent + shape.rope
    tile = {"fp8": 128}.get(storage, shape.latent)
    rope_tile = min(32, shape.rope) or 1
    cached_B = np.array([cached for cached, _ in lengths])
    rows = random.standard_normal((batch, 1, shape.capacity, wide)).astype(kind)
    stale_BM = np.arange(shape.capacity) >= cached_B[:, None]
    scales = np.zeros((batch, 1, shape.capacity, 0), np.float32)
    if storage == "plain":
        rows[stale_BM[:, None]] = np.nan
    else:
        rows, scales = coded(rows.astype(np.float64), storage, (shape.latent, tile, rope_tile))
        junk = random.integers(0, 256, rows.shape, dtype=np.uint8).view(rows.dtype)
        rows = np.where(stale_BM[:, None, :, None], junk, rows)
        scales[stale_BM[:, None]] = np.nan
    new_row = random.standard_normal((batch, shape.new, wide)).astype(kind)
    query = random.standard_normal((batch, shape.new, shape.heads, wide)).astype(kind)
    new_B = np.array([new for _, new in lengths])
    # Padding is not to be read either.
    padded_BS = np.arange(shape.new) >= new_B[:, None]
    query[padded_BS], new_row[padded_BS] = np.nan, np.nan
    return Problem(
        query_BSHE=query, new_row_BSE=new_row, cache_B1ME=rows,
        cache_lengths_B=cached_B.astype(np.int64), new_lengths_B=new_B.astype(np.int64),
        scales_B1MG=scales, latent=shape.latent, scale=1.5 * wide**-0.5, storage=storage,
        tile=tile, rope_tile=rope_tile,
    )  # fmt: skip


def coded(rows: Array, storage: str, widths: tuple[int, int, int]) -> tuple[Array, Array]:
    """8-bit codes and fp32 scales of rows [..., E]. `widths`: L, columns a scale, and of rope."""
    latent, tile, rope_tile = widths
    edges = [*range(0, latent, tile), *range(latent, rows.shape[-1], rope_tile), rows.shape[-1]]
    codes = np.zeros(rows.shape, np.uint8 if storage == "fp8" else np.int8)
    scales = np.zeros((*rows.shape[:-1], len(edges) - 1), np.float32)
    for g, (first, end) in enumerate(pairwise(edges)):
        part = rows[..., first:end]
        peak = np.abs(part).max(-1).astype(np.float32)
        scale = np.where(peak > 0, peak / np.float32(LARGEST[storage]), np.float32(1))
        scales[..., g] = scale
        ratio = (part.astype(np.float32) / scale[..., None]).astype(np.float64)
        codes[..., first:end] = _nearest_e4m3(ratio) if storage == "fp8" else np.rint(ratio)
    return codes, scales


def _nearest_e4m3(x: Array) -> Array:
    """By table: of the two nearest numbers the nearer, of two as near the even code."""
    positive = E4M3[:127]  # 0 to 448, rising with the code
    size = np.minimum(np.abs(x), 448.0)
    above = np.searchsorted(positive, size).clip(1, 126)
    low, high = positive[above - 1], positive[above]
    middle = (low + high) / 2
    up = (size > middle) | ((size == middle) & (above % 2 == 0))
    return (np.where(up, above, above - 1) + 128 * np.signbit(x)).astype(np.uint8)


def widened(codes: Array, scales: Array, call: Problem) -> Array:
    """Rows [..., E] in float64 from codes and scales."""
    if call.storage == "plain":
        return codes.astype(np.float64)
    latent_scales = call.latent // call.tile
    columns = np.arange(codes.shape[-1])
    group = np.where(
        columns < call.latent,
        columns // call.tile,
        latent_scales + (columns - call.latent) // call.rope_tile,
    )
    wide = E4M3[codes] if call.storage == "fp8" else codes.astype(np.float64)
    return wide * scales[..., group].astype(np.float64)


def expected(call: Problem) -> tuple[Array, Array, Array]:
    """out_BSHL in float64, and cache and scales after the call."""
    cache, scales = call.cache_B1ME.copy(), call.scales_B1MG.copy()
    out = np.zeros((*call.query_BSHE.shape[:3], call.latent))
    widths = (call.latent, call.tile, call.rope_tile)
    for b, (past, new) in enumerate(zip(call.cache_lengths_B, call.new_lengths_B, strict=True)):
        for s in range(new):
            row = call.new_row_BSE[b, s]
            if call.storage == "plain":
                cache[b, 0, past + s] = row
            else:
                codes, own = coded(row.astype(np.float64), call.storage, widths)
                cache[b, 0, past + s], scales[b, 0, past + s] = codes, own
        for s in range(new):
            seen = past + s + 1
            rows_TE = widened(cache[b, 0, :seen], scales[b, 0, :seen], call)
            scores_HT = call.query_BSHE[b, s].astype(np.float64) @ rows_TE.T * call.scale
            weights_HT = np.exp(scores_HT - scores_HT.max(-1, keepdims=True))
            weights_HT /= weights_HT.sum(-1, keepdims=True)
            out[b, s] = weights_HT @ rows_TE[:, : call.latent]
    return out, cache, scales


def same_bytes(found: Array, wanted: Array) -> bool:
    """Bit for bit, NaN payloads too."""
    return found.shape == wanted.shape and found.tobytes() == wanted.astype(found.dtype).tobytes()
