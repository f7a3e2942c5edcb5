"""Where a weight lies: part of a tensor on disk, several tensors below each other, or nowhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from mla_deploy.errors import InputError, quoted

if TYPE_CHECKING:
    import torch

    from mla_deploy.checkpoint.reader import Checkpoint


@dataclass(frozen=True)
class TensorSlice:
    """Part of a tensor on disk: `index` along its first axis, then `rows`; `shape` of the part."""

    tensor: str
    index: int | None
    rows: tuple[int, int] | None
    shape: tuple[int, ...]
    dtype: str

    def first_value(self, whole: tuple[int, ...]) -> int:
        """How many values of the tensor, of shape `whole`, come before it."""
        before = 0 if self.index is None else self.index * prod(whole[1:])
        return before + (0 if self.rows is None else self.rows[0] * prod(self.shape[1:]))


@dataclass(frozen=True)
class Zeros:
    """Zero, whatever the checkpoint holds: what it may leave out, or what the class overwrites."""

    shape: tuple[int, ...]
    dtype: str = "F32"


@dataclass(frozen=True)
class StackedSlices:
    """Parts whose rows follow each other in a weight of `shape`."""

    parts: tuple[TensorSlice | Zeros, ...]
    shape: tuple[int, ...]
    dtype: str


class Made(ABC):
    """A weight that is made from what lies elsewhere, in `dtype`."""

    dtype: str

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @abstractmethod
    def read(self, checkpoint: Checkpoint, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of it. Raises: as `Checkpoint.read`."""


Place = TensorSlice | StackedSlices | Zeros | Made


def read_place(checkpoint: Checkpoint, place: Place, start: int, stop: int) -> torch.Tensor:
    """Rows `start` to `stop` of what lies at `place`; only their bytes are read.

    Raises: as `Checkpoint.read`.
    """
    import torch

    if not 0 <= start < stop <= place.shape[0]:
        raise InputError(
            "CKPT-SLICE",
            f"rows {start}:{stop} of {quoted(_told(place))} {list(place.shape)} are outside it",
            tensor=_told(place),
        )
    if isinstance(place, Made):
        return place.read(checkpoint, start, stop)
    if not isinstance(place, StackedSlices):
        return _rows(checkpoint, place, start, stop)
    found: list[torch.Tensor] = []
    offset = 0
    for part in place.parts:
        first, last = max(start - offset, 0), min(stop - offset, part.shape[0])
        if first < last:
            found.append(_rows(checkpoint, part, first, last))
        offset += part.shape[0]
    return torch.cat(found) if len(found) > 1 else found[0]


def _rows(checkpoint: Checkpoint, part: TensorSlice | Zeros, start: int, stop: int) -> torch.Tensor:
    if isinstance(part, Zeros):
        import torch

        dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        return torch.zeros((stop - start, *part.shape[1:]), dtype=dtypes[part.dtype])
    offset = part.rows[0] if part.rows is not None else 0
    whole = part.rows is None and (start, stop) == (0, part.shape[0])
    rows = None if whole else slice(offset + start, offset + stop)
    return checkpoint.read(part.tensor, rows=rows, index=part.index)


def _told(place: Place) -> str:
    parts = place.parts if isinstance(place, StackedSlices) else (place,)
    on_disk = (part.tensor for part in parts if isinstance(part, TensorSlice))
    return next(on_disk, "a weight that is not on disk")
