"""Tensors that go into the weight file with the bits that they have in the checkpoint.

`--weights keep`: what `in_place.keep` would leave in the checkpoint's own files is copied instead,
eight-bit values and their scales beside them, and the graphs read it in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import torch

from mla_deploy.checkpoint import Checkpoint
from mla_deploy.errors import InputError, quoted

if TYPE_CHECKING:
    from mla_deploy.export.gather import Gather
    from mla_deploy.export.in_place import Kept, OnDisk
    from mla_deploy.export.weights import WeightLayout

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I8": 1}
# The largest magnitude that a scale multiplies.
_LARGEST = {"F8_E4M3": 448.0, "I8": 128.0}


@dataclass(frozen=True)
class CopiedTensor:
    """`shape` values of the checkpoint's tensor `tensor` from value `first` on, under `name`.

    `multiplies` is the dtype of the values that it is a scale of, "" for any other tensor.
    """

    name: str
    tensor: str
    first: int
    shape: tuple[int, ...]
    file_dtype: str  # as safetensors calls it
    multiplies: str = ""

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.file_dtype]

    @property
    def unit(self) -> int:
        """As `StoredWeight.unit`."""
        return self.item_bytes

    @property
    def file_shape(self) -> tuple[int, ...]:
        """As the file's header tells it."""
        return self.shape

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.item_bytes

    def gather(self, source: Checkpoint, gather: Gather, block_bytes: int) -> Iterator[int]:
        """Read its values straight into what is written; the bytes of each block.

        Raises: InputError CKPT-NONFINITE, CKPT-TRUNCATED; IntegrityError CKPT-CHANGED.
        """
        start, count = 0, prod(self.shape)
        while start < count:
            most = min(count - start, max(1, block_bytes // self.item_bytes))
            room = gather.room(most * self.item_bytes)
            size = len(room) // self.item_bytes
            block = source.read_stored(self.tensor, self.first + start, (size,), room)
            self._check_product(block)
            gather.take(len(room))
            yield len(room)
            start += size

    def _check_product(self, scales: torch.Tensor) -> None:
        """A graph multiplies in fp32; what passes its range would be infinite there."""
        if not self.multiplies:
            return
        largest = float(scales.abs().max()) * _LARGEST[self.multiplies]
        if largest > torch.finfo(torch.float32).max:
            raise InputError(
                "CKPT-NONFINITE",
                f"{quoted(self.tensor)} scales values up to {largest:.6g}, beyond fp32",
                hint="the file is damaged; fetch it again",
                tensor=self.tensor,
            )


def copy_kept(layout: WeightLayout, kept: Kept, source: Checkpoint, file: str) -> Kept:
    """Add to `layout` what would stay in place; where that will lie, in the weight file `file`."""
    for name, place in kept.items():
        layout.copied[name] = _copied(name, place, source)
        if place.scale is not None:
            scale_name = f"{name}.scale"
            scale = _copied(scale_name, place.scale, source)
            layout.copied[scale_name] = replace(scale, multiplies=place.dtype)
    ranges = layout.ranges()
    return {name: _moved(name, place, ranges, file) for name, place in kept.items()}


def _copied(name: str, place: OnDisk, source: Checkpoint) -> CopiedTensor:
    before = place.offset - source.stored[place.tensor].offset
    first = before // ITEM_BYTES[place.dtype]
    return CopiedTensor(name, place.tensor, first, place.shape, place.dtype)


def _moved(name: str, place: OnDisk, ranges: Mapping[str, tuple[int, int]], file: str) -> OnDisk:
    scale = place.scale
    if scale is not None:
        scale = _moved(f"{name}.scale", scale, ranges, file)
    return replace(place, file=file, offset=ranges[name][0], scale=scale)
