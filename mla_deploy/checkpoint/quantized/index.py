"""`g_idx`: the group of each input column, where quantisation took the columns out of order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mla_deploy.checkpoint.header import TensorInfo
from mla_deploy.checkpoint.quantized.parts import (
    PartReader,
    Stored,
    check_part_shape,
    wrong_value,
)

if TYPE_CHECKING:
    import torch


def find_group_index(values: TensorInfo, stored: Stored, name: str, columns: int) -> TensorInfo:
    """The part, an int32 vector of one group number per column.

    Raises: InputError CKPT-PART, CKPT-PART-SHAPE.
    """
    part = stored.part(values, name, "I32")
    check_part_shape(part, ((columns,),), f"{columns} columns")
    return part


def read_group_index(
    part: TensorInfo | None, reader: PartReader, groups: int
) -> torch.Tensor | None:
    """Its values, each a group that exists; None without the part.

    Raises: InputError CKPT-PART-VALUE.
    """
    if part is None:
        return None
    index = reader.vector(part)
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= groups:
        bad = low if low < 0 else high
        raise wrong_value(part, f"holds group {bad}, wanted 0 to {groups - 1}")
    return index
