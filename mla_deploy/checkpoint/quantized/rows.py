"""Rows of a quantised weight as float32: the parts that they need, and no more, are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mla_deploy.checkpoint.quantized.inventory import FORMATS
from mla_deploy.checkpoint.quantized.parts import PartReader, QuantizedTensor
from mla_deploy.checkpoint.shards import Shards

if TYPE_CHECKING:
    import torch


def read_quantized(
    shards: Shards, tensor: QuantizedTensor, rows: slice | None, index: int | None
) -> torch.Tensor:
    """The weight, or the part of it that `rows` and `index` select; see `Checkpoint.read`.

    Computed in float32: products of values of 8 bits or less with scales of 16 are exact.
    Raises: InputError CKPT-SLICE, CKPT-PART-VALUE, CKPT-NONFINITE, CKPT-TRUNCATED.
    """
    import torch

    from mla_deploy.checkpoint.values import check_finite, selection

    shape, reader = tensor.info.shape, PartReader(shards)
    start, stop = selection(tensor.info, rows, index)

    def matrix(expert: int | None, first: int, last: int) -> torch.Tensor:
        found = FORMATS[tensor.scheme.layout].read(tensor, reader, expert, first, last)
        check_finite(found, tensor.parts["values"])
        return found

    if len(shape) == 2:
        if index is None:
            return matrix(None, start, stop)
        return matrix(None, index, index + 1)[0, start:stop]
    if index is not None:
        return matrix(index, start, stop)
    experts = torch.empty((stop - start, *shape[1:]))
    for place in range(stop - start):
        experts[place] = matrix(start + place, 0, shape[1])
    return experts
