"""Tensor bytes into torch, checked for NaN and infinity on the way."""

from __future__ import annotations

from math import prod

import torch

from mla_deploy.checkpoint.header import DTYPE_BITS, TensorInfo
from mla_deploy.checkpoint.shards import Shards
from mla_deploy.errors import InputError, quoted

_TORCH = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8, "U8": torch.uint8, "I32": torch.int32,
}  # fmt: skip
# Values looked at in one go: bounds the temporary that the check makes.
_CHUNK = 1 << 22


def read_values(
    shards: Shards, info: TensorInfo, rows: slice | None, index: int | None
) -> torch.Tensor:
    """The tensor or the part of it that `index` and `rows` select; see `Checkpoint.read`."""
    start, stop = selection(info, rows, index)
    below = info.shape[1:] if index is None else info.shape[2:]
    first = start if index is None else index * info.shape[1] + start
    values = read_raw(shards, info, first * prod(below), (stop - start, *below))
    check_finite(values, info)
    return values


def selection(info: TensorInfo, rows: slice | None, index: int | None) -> tuple[int, int]:
    """The first row and the one after the last that `rows` means, once `index` is taken.

    Raises: InputError CKPT-SLICE.
    """
    shape = info.shape
    if index is not None:
        if len(shape) < 2 or not 0 <= index < shape[0]:
            raise _bad_slice(info, f"index {index}")
        shape = shape[1:]
    if rows is None:
        return 0, shape[0]
    start, stop = rows.start or 0, shape[0] if rows.stop is None else rows.stop
    if rows.step not in (None, 1) or not 0 <= start < stop <= shape[0]:
        raise _bad_slice(info, f"rows {start}:{stop}")
    return start, stop


def read_raw(
    shards: Shards,
    info: TensorInfo,
    first: int,
    shape: tuple[int, ...],
    out: memoryview | None = None,
) -> torch.Tensor:
    """`shape` neighbouring values from value `first` on, in the dtype on disk, not checked.

    They lie in `out`, of just that many bytes, where it is given; then the file is being streamed.
    """
    itemsize = DTYPE_BITS[info.dtype] // 8
    start = info.offset + first * itemsize
    if out is not None:
        shards.read_once_into(out, info.file, start, info.name)
        raw = torch.frombuffer(out, dtype=torch.uint8)
    else:
        raw = torch.empty(prod(shape) * itemsize, dtype=torch.uint8)
        shards.read_into(raw.numpy().data, info.file, start, info.name)
    return raw.view(_TORCH[info.dtype]).reshape(shape)


def read_columns(shards: Shards, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
    """Columns of a matrix in the dtype on disk, not checked: one read per row."""
    height, width = info.shape
    if (start, stop) == (0, width):
        return read_raw(shards, info, 0, (height, width))
    itemsize = DTYPE_BITS[info.dtype] // 8
    length = (stop - start) * itemsize
    raw = torch.empty(height * length, dtype=torch.uint8)
    buffer = raw.numpy().data
    for row in range(height):
        offset = info.offset + (row * width + start) * itemsize
        shards.read_into(buffer[row * length : (row + 1) * length], info.file, offset, info.name)
    return raw.view(_TORCH[info.dtype]).reshape(height, stop - start)


def check_finite(values: torch.Tensor, info: TensorInfo) -> None:
    """Refuse NaN and infinity among values that belong to `info`.

    Raises: InputError CKPT-NONFINITE.
    """
    if not values.dtype.is_floating_point:
        return
    if values.dtype is torch.float8_e4m3fn:
        _check_bytes(values, info)
        return
    for chunk in values.reshape(-1).split(_CHUNK):
        # Both ends of the range carry a NaN on and show an infinity: one pass, no mask.
        low, high = torch.aminmax(chunk)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            bad = chunk[~torch.isfinite(chunk)][0].item()
            raise _not_finite(info, bad)


def _check_bytes(values: torch.Tensor, info: TensorInfo) -> None:
    """Of float8_e4m3fn all bits but the sign are set in NaN, and there is no infinity."""
    for chunk in values.reshape(-1).view(torch.uint8).split(_CHUNK):
        if bool(((chunk & 0x7F) == 0x7F).any()):
            raise _not_finite(info, float("nan"))


def _not_finite(info: TensorInfo, found: float) -> InputError:
    return InputError(
        "CKPT-NONFINITE",
        f"{quoted(info.name)} in {quoted(info.file)} holds {found}, wanted finite values",
        hint="the file is damaged or the training diverged; fetch it again",
        tensor=info.name,
        file=info.file,
    )


def _bad_slice(info: TensorInfo, what: str) -> InputError:
    return InputError(
        "CKPT-SLICE",
        f"{what} of {quoted(info.name)} {list(info.shape)} is outside it",
        tensor=info.name,
    )
