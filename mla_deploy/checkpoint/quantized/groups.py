"""Arithmetic that the formats share: small integers unpacked, a grid of scales spread out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def blocks(length: int, size: int) -> int:
    """Blocks of `size` that cover `length`, the last one perhaps in part; 0 is one block."""
    return -(-length // size) if size else 1


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers of `bits` (1, 2, 4 or 8) each, lowest bits first along the last axis, as bytes."""
    import torch

    # Flat first: the last stride of an axis of one may be any number, which a view would refuse.
    raw = words.reshape(-1).view(torch.uint8)
    mask = (1 << bits) - 1
    codes = torch.stack([(raw >> shift) & mask for shift in range(0, 8, bits)], -1)
    return codes.view(*words.shape[:-1], -1)


def spread(
    values_RC: torch.Tensor, grid_RG: torch.Tensor, width: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Views of the values with the part of the grid that belongs to each, ready to broadcast.

    Column c of the values belongs to column c // width of the grid. No copy is made.
    """
    full = values_RC.shape[1] // width
    if full:
        yield values_RC[:, : full * width].unflatten(1, (full, width)), grid_RG[:, :full, None]
    if full * width < values_RC.shape[1]:
        yield values_RC[:, full * width :], grid_RG[:, full : full + 1]


def dequantized(
    values_RC: torch.Tensor,
    scale_RG: torch.Tensor,
    zero_RG: torch.Tensor | None,
    group_index: torch.Tensor | None,
    *,
    width: int,
) -> torch.Tensor:
    """(value - zero point) * scale, in place; each column in its group of `width` neighbours.

    `group_index`: the group of each column instead.
    """
    if group_index is not None:
        if zero_RG is not None:
            values_RC.sub_(zero_RG.index_select(1, group_index))
        return values_RC.mul_(scale_RG.index_select(1, group_index))
    if zero_RG is not None:
        for values, zero in spread(values_RC, zero_RG, width):
            values.sub_(zero)
    for values, scale in spread(values_RC, scale_RG, width):
        values.mul_(scale)
    return values_RC
