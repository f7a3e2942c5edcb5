"""Tensor bytes into torch, checked for NaN and infinity on the way."""

from __future__ import annotations

from math import prod

import torch

from mla_deploy.checkpoint.header import DTYPE_BITS, TensorInfo
from mla_deploy.checkpoint.shards import Shards
from mla_deploy.errors import InputError, quoted

_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Values looked at in one go: bounds the temporary that the check makes.
_CHUNK = 1 << 22


def read_values(
    shards: Shards, info: TensorInfo, rows: slice | None, index: int | None
) -> torch.Tensor:
    """The tensor or the part of it that `index` and `rows` select; see `Checkpoint.read`."""
    offset, shape = info.offset, list(info.shape)
    itemsize = DTYPE_BITS[info.dtype] // 8
    if index is not None:
        if len(shape) < 2 or not 0 <= index < shape[0]:
            raise _bad_slice(info, f"index {index}")
        del shape[0]
        offset += index * prod(shape) * itemsize
    if rows is not None:
        start, stop = rows.start or 0, shape[0] if rows.stop is None else rows.stop
        if rows.step not in (None, 1) or not 0 <= start < stop <= shape[0]:
            raise _bad_slice(info, f"rows {start}:{stop}")
        offset += start * prod(shape[1:]) * itemsize
        shape[0] = stop - start
    raw = torch.empty(prod(shape) * itemsize, dtype=torch.uint8)
    shards.read_into(raw.numpy().data, info.file, offset, info.name)
    values = raw.view(_TORCH[info.dtype])
    _check_finite(values, info)
    return values.reshape(shape)


def _check_finite(values: torch.Tensor, info: TensorInfo) -> None:
    for chunk in values.split(_CHUNK):
        # Both ends of the range carry a NaN on and show an infinity: one pass, no mask.
        low, high = torch.aminmax(chunk)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            bad = chunk[~torch.isfinite(chunk)][0].item()
            raise InputError(
                "CKPT-NONFINITE",
                f"{quoted(info.name)} in {quoted(info.file)} holds {bad}, wanted finite values",
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
