"""What a quantised weight is made of: its parts on disk, found by name and checked by shape.

A format (one file each beside this one) finds the parts of a weight in the headers, then reads rows
of them. Nothing here loads a library until values are read.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mla_deploy.checkpoint.header import TensorInfo
from mla_deploy.checkpoint.shards import Shards
from mla_deploy.errors import InputError, quoted
from mla_deploy.quantization import WeightScheme

if TYPE_CHECKING:
    import torch

FLOATS = ("F32", "BF16", "F16")
_AGAIN = "the download is incomplete or damaged, or config.json is of another revision"


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight as the model knows it (`info`, float32) and the tensors on disk it is made of.

    `parts`: role -> tensor on disk. `values` holds the weight's own bits; the others say what they
    mean: `scale`, `global_scale`, `zero_point`, `shape`, `group_index`.
    """

    info: TensorInfo
    scheme: WeightScheme
    parts: Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Format:
    """A layout on disk: which tensors hold values of it, how the rest is found, how rows are read.

    `read(tensor, reader, index, start, stop)`: output rows start to stop, float32 [rows, columns].
    """

    claims: Callable[[TensorInfo], bool]
    find: Callable[[TensorInfo, Stored, WeightScheme], QuantizedTensor]
    read: Callable[[QuantizedTensor, PartReader, int | None, int, int], torch.Tensor]


class Stored:
    """The tensors on disk by name, for a format to look for parts in."""

    def __init__(self, tensors: Mapping[str, TensorInfo], shards: Shards) -> None:
        self._tensors = tensors
        self._shards = shards

    def part(self, values: TensorInfo, name: str, *dtypes: str) -> TensorInfo:
        """The part `name` of the weight with these values, in one of `dtypes`.

        Raises: InputError CKPT-PART, CKPT-PART-SHAPE.
        """
        found = self._tensors.get(name)
        if found is None:
            raise InputError(
                "CKPT-PART",
                f"{quoted(values.name)} is quantised, but its {quoted(name)} is missing",
                hint=_AGAIN,
                tensor=name,
                file=values.file,
            )
        if found.dtype not in dtypes:
            raise wrong_part(found, f"is {found.dtype}, wanted {' or '.join(dtypes)}")
        return found

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return name in self._tensors

    def integers(self, part: TensorInfo, most: int) -> tuple[int, ...]:
        """The values of a small I32 or I64 tensor, at most `most` of them.

        Raises: InputError CKPT-PART-SHAPE, CKPT-TRUNCATED.
        """
        if len(part.shape) != 1 or part.shape[0] > most:
            raise wrong_part(part, f"is {list(part.shape)}, wanted a vector of up to {most} sizes")
        raw = bytearray(part.nbytes)
        self._shards.read_into(memoryview(raw), part.file, part.offset, part.name)
        return struct.unpack(f"<{part.shape[0]}{'i' if part.dtype == 'I32' else 'q'}", raw)


class PartReader:
    """Values of parts from disk, only the rows or columns asked for."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards

    def rows(self, part: TensorInfo, index: int | None, start: int, stop: int) -> torch.Tensor:
        """Rows of the part, or of its matrix `index`, in the dtype on disk; not checked."""
        from mla_deploy.checkpoint.values import read_raw

        height, width = part.shape[-2:]
        first = ((index or 0) * height + start) * width
        return read_raw(self._shards, part, first, (stop - start, width))

    def columns(self, part: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Columns of a part that is a matrix, in the dtype on disk; not checked."""
        from mla_deploy.checkpoint.values import read_columns

        return read_columns(self._shards, part, start, stop)

    def grid(
        self, part: TensorInfo, index: int | None, start: int, stop: int, *, size: tuple[int, int]
    ) -> torch.Tensor:
        """Rows of a part that is a grid of `size`, whatever its rank, as finite float32.

        Bytes are powers of two: exponents, as F8_E8M0 holds them.
        """
        import torch

        from mla_deploy.checkpoint.values import check_finite, read_raw

        first = ((index or 0) * size[0] + start) * size[1]
        found = read_raw(self._shards, part, first, (stop - start, size[1]))
        if found.dtype is torch.uint8:
            found = found.view(torch.float8_e8m0fnu)
        values = found.float()
        check_finite(values, part)
        return values

    def transposed_grid(self, part: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Columns of a matrix of scales, turned into rows, as finite float32."""
        from mla_deploy.checkpoint.values import check_finite

        values = self.columns(part, start, stop).float()
        check_finite(values, part)
        return values.T.contiguous()

    def vector(self, part: TensorInfo) -> torch.Tensor:
        """All values of a vector."""
        from mla_deploy.checkpoint.values import read_raw

        return read_raw(self._shards, part, 0, part.shape)


def logical(
    values: TensorInfo, name: str, shape: tuple[int, ...], *parts: TensorInfo
) -> TensorInfo:
    """The weight as the model knows it. It lies at no single place: its offset is -1."""
    nbytes = values.nbytes + sum(part.nbytes for part in parts)
    return TensorInfo(name, "F32", shape, values.file, -1, nbytes)


def check_part_shape(part: TensorInfo, wanted: tuple[tuple[int, ...], ...], why: str) -> None:
    """Refuse a part with none of the `wanted` shapes.

    Raises: InputError CKPT-PART-SHAPE.
    """
    if part.shape not in wanted:
        raise wrong_part(part, f"is {list(part.shape)}, wanted {list(wanted[0])} for {why}")


def wrong_part(part: TensorInfo, problem: str) -> InputError:
    """The refusal of a part whose dtype or shape does not fit its weight."""
    return InputError(
        "CKPT-PART-SHAPE",
        f"{quoted(part.name)} {problem}",
        hint=_AGAIN,
        tensor=part.name,
        file=part.file,
    )


def wrong_value(part: TensorInfo, problem: str) -> InputError:
    """The refusal of a part that says something impossible."""
    return InputError(
        "CKPT-PART-VALUE",
        f"{quoted(part.name)} {problem}",
        hint=_AGAIN,
        tensor=part.name,
        file=part.file,
    )
