"""The arithmetic of `latent_store.py` as nodes of a graph; scales are in fp32 here.

`op` is a rule's builder or a `Body`: what reads a cache is made inside the branch that reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Any

import onnx_ir as ir

from mla_deploy.latent_store import TINY, LatentStore
from mla_deploy.rewrite.rule import ints, nibbles, number, required
from mla_deploy.source.latent_values import e4m3_values

_FLOAT, _UINT8 = ir.DataType.FLOAT, ir.DataType.UINT8


def encode(op: Any, rows_BSL: ir.Value, store: LatentStore, rank: int) -> tuple[ir.Value, ir.Value]:
    """codes [B, S, columns] uint8, scales [B, S, tiles] in fp32, rounded as they are stored."""
    tiles, tiled, axis = store.tiles(rank), rows_BSL, 2
    if tiles > 1:
        tiled, axis = op.Reshape(rows_BSL, ints(op, [0, 0, tiles, rank // tiles])), 3
    peaks = op.ReduceMax(op.Abs(tiled), ints(op, [axis]), keepdims=1)
    scales_BSG = _scales(op, peaks, store)
    ratios = op.Div(tiled, scales_BSG)
    if tiles > 1:
        ratios = op.Reshape(ratios, ints(op, [0, 0, rank]))
        scales_BSG = op.Squeeze(scales_BSG, ints(op, [3]))
    if store.is_float:
        return _e4m3_codes(op, ratios), scales_BSG
    codes = op.Add(op.Round(ratios), number(op, store.zero))
    if store.bits == 4:
        half = rank // 2
        low, high = op.Split(codes, ints(op, [half, half]), axis=2, _outputs=2)
        codes = op.Add(low, op.Mul(high, number(op, 16)))
    return op.Cast(codes, to=_UINT8), scales_BSG


def _scales(op: Any, peaks: ir.Value, store: LatentStore) -> ir.Value:
    least, steps = number(op, store.least_scale), number(op, store.steps)
    if store.scale_dtype == "fp32":
        return required(op.Div(op.Max(peaks, least), steps))
    half = op.Cast(op.Max(op.Div(peaks, steps), least), to=ir.DataType.FLOAT16)
    return required(op.Cast(half, to=_FLOAT))


def decode(
    op: Any, codes_B1TC: ir.Value, scales_B1TG: ir.Value, store: LatentStore, rank: int
) -> ir.Value:
    """Rows [B, 1, T, L] in fp32."""
    tiles = store.tiles(rank)
    if not store.is_float:
        unpacked = _unpacked(op, codes_B1TC, store)
        whole = unpacked[0] if len(unpacked) == 1 else op.Concat(*unpacked, axis=3)
        zero = ir.tensor([store.zero], _UINT8)
        zeros_B1TG = op.ConstantOfShape(op.Shape(scales_B1TG), value=zero)
        # In one pass; widening, subtracting and multiplying took 1.5 to 2.1 times as long.
        return required(
            op.DequantizeLinear(whole, scales_B1TG, zeros_B1TG, axis=3, block_size=rank // tiles)
        )
    table = op.Constant(value=ir.tensor(e4m3_values()))
    values = op.Gather(table, op.Cast(codes_B1TC, to=ir.DataType.INT32))
    if tiles == 1:
        return required(op.Mul(values, scales_B1TG))
    # Batch and rows fold: a Reshape copies at most the axes that lie where they did.
    tiled = op.Reshape(values, ints(op, [0, 0, -1, tiles, rank // tiles]))
    return op.Reshape(op.Mul(tiled, op.Unsqueeze(scales_B1TG, ints(op, [4]))),
                      ints(op, [0, 0, -1, rank]))  # fmt: skip


@dataclass(frozen=True)
class Plane:
    """Columns `first` to `first + width` of a latent as bytes that multiply as they are."""

    codes_B1TK: ir.Value
    scale_B11T: ir.Value
    first: int
    width: int


def planes(
    op: Any, codes_B1TC: ir.Value, scales_B1TG: ir.Value, store: LatentStore, rank: int
) -> list[Plane]:
    """One plane a tile: whole rows as they lie, nibbles unpacked, tiles sliced."""
    tiles, found = store.tiles(rank), []
    width = rank // tiles
    turned_B1GT = op.Transpose(scales_B1TG, perm=[0, 1, 3, 2])
    unpacked = _unpacked(op, codes_B1TC, store)
    for tile in range(tiles):
        scale = turned_B1GT
        if tiles > 1:
            scale = op.Slice(turned_B1GT, ints(op, [tile]), ints(op, [tile + 1]), ints(op, [2]))
        if store.bits == 4 or tiles == 1:
            codes = unpacked[tile]
        else:
            edges = (ints(op, [tile * width]), ints(op, [(tile + 1) * width]))
            codes = op.Slice(codes_B1TC, *edges, ints(op, [3]))
        found.append(Plane(codes, scale, tile * width, width))
    return found


def _unpacked(op: Any, codes: ir.Value, store: LatentStore) -> tuple[ir.Value, ...]:
    """Bytes with one code each, of which a row's halves are apart where two codes were in one."""
    return (codes,) if store.bits == 8 else nibbles(op, codes)


def _e4m3_codes(op: Any, ratios: ir.Value) -> ir.Value:
    """As `source/latent_values.py` makes them; the runtime's own Cast rounds."""
    cast = op.Cast(op.Cast(ratios, to=ir.DataType.FLOAT8E4M3FN), to=_FLOAT)
    size = op.Abs(cast)
    # A rounded number is 1 to 1.875 times a power of two; 1.03 keeps the logarithm off the edges.
    binade = op.Floor(op.Mul(op.Log(op.Max(op.Mul(size, number(op, 1.03)), number(op, TINY))),
                             number(op, 1 / log(2))))  # fmt: skip
    exponent = op.Max(binade, number(op, -6))
    steps = op.Div(op.Mul(size, number(op, 8)), op.Pow(number(op, 2), exponent))
    codes = op.Round(op.Add(op.Mul(op.Add(exponent, number(op, 6)), number(op, 8)), steps))
    sign = op.Where(op.Less(cast, number(op, 0)), number(op, 128), number(op, 0))
    return op.Cast(op.Add(codes, sign), to=_UINT8)
