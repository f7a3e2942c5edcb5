"""Arithmetic that the formats share: bytes to the values in them, a grid of scales spread out."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

# Bytes looked up in one go: the indices that numpy makes of them stay in the processor's cache.
_CHUNK = 1 << 16


def blocks(length: int, size: int) -> int:
    """Blocks of `size` that cover `length`, the last one perhaps in part; 0 is one block."""
    return -(-length // size) if size else 1


def decoded(raw: torch.Tensor, table: NDArray[np.float32]) -> torch.Tensor:
    """The float32 values of each byte along the last axis, looked up in `table` [256, values].

    Several times as fast as torch's own conversions from 8 bits, and no temporary of that size.
    """
    import numpy as np
    import torch

    # Flat first: the last stride of an axis of one may be any number, which a view would refuse.
    flat = raw.reshape(-1).view(torch.uint8).numpy()
    values = np.empty((flat.size, table.shape[1]), np.float32)
    for start in range(0, flat.size, _CHUNK):
        stop = start + _CHUNK
        np.take(table, flat[start:stop], axis=0, out=values[start:stop], mode="clip")
    return torch.from_numpy(values).view(*raw.shape[:-1], -1)


@lru_cache
def integer_table(bits: int, zero: int) -> NDArray[np.float32]:
    """Unsigned integers of `bits`, lowest bits of the byte first, less `zero`."""
    import numpy as np

    shifts, mask = range(0, 8, bits), (1 << bits) - 1
    rows: list[list[Any]] = [[(byte >> s & mask) - zero for s in shifts] for byte in range(256)]
    return np.array(rows, np.float32)


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers of `bits` (2, 4 or 8) each, lowest bits first along the last axis, as bytes."""
    import torch

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
