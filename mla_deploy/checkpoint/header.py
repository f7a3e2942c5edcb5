"""The header of a safetensors file: 8 bytes of length, JSON, then the tensors' bytes.

The format's rules and ours: every dtype is known, every range lies in the file, ranges follow each
other without hole or overlap up to the file's end, names are plain and stand once, no tensor is
empty. Nothing is allocated from a number before it was compared with the file's size.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

from mla_deploy.errors import InputError, quoted
from mla_deploy.strict_json import parse_json, stand_in_hint

MAX_HEADER_BYTES = 32 << 20
MAX_TENSORS = 100_000
_MAX_RANK = 8
_MAX_DIM = 1 << 40
_MAX_NAME = 512
# Strings, numbers and containers of one entry, with room.
_VALUES_PER_TENSOR = 16

_INCOMPLETE = "the copy or download is incomplete; fetch the file again"

# Bits per element of every dtype the format knows.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One tensor on disk: `offset` is the absolute byte in `file`, `dtype` safetensors' name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


def read_header(descriptor: int, file: str) -> tuple[TensorInfo, ...]:
    """The tensors of an open safetensors file, in the order of their bytes.

    Raises: InputError CKPT-HEADER, CKPT-LFS, CKPT-NAME, CKPT-DTYPE, CKPT-EMPTY, CKPT-RANGE.
    """
    size = os.fstat(descriptor).st_size
    text, data_start = _header_text(descriptor, file, size)
    parsed = parse_json(
        text,
        what=file,
        code="CKPT-HEADER",
        max_values=MAX_TENSORS * _VALUES_PER_TENSOR,
    )
    if not isinstance(parsed, dict):
        raise _refusal("CKPT-HEADER", file, "the header is not an object")
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _refusal("CKPT-HEADER", file, "__metadata__ must map names to texts")
    if not parsed:
        raise _refusal("CKPT-EMPTY", file, "the file holds no tensors")
    if len(parsed) > MAX_TENSORS:
        raise _refusal("CKPT-HEADER", file, f"{len(parsed)} tensors, at most {MAX_TENSORS} allowed")
    entries = [_entry(name, found, file, data_start, size) for name, found in parsed.items()]
    entries.sort(key=lambda info: (info.offset, info.nbytes))
    _check_ranges(entries, file, data_start, size)
    return tuple(entries)


def _header_text(descriptor: int, file: str, size: int) -> tuple[bytes, int]:
    start = os.pread(descriptor, 64, 0)
    hint = stand_in_hint(start)
    if hint:
        raise InputError(
            "CKPT-LFS", f"{quoted(file)} is not a safetensors file", hint=hint, file=file
        )
    if len(start) < 8:
        raise _refusal("CKPT-HEADER", file, f"the file is {size} bytes short of a header")
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise _refusal(
            "CKPT-HEADER", file, f"the header claims {length} bytes, limit {MAX_HEADER_BYTES}"
        )
    if 8 + length > size:
        raise _refusal(
            "CKPT-HEADER", file, f"the header claims {length} bytes, the file holds {size}"
        )
    text = os.pread(descriptor, length, 8)
    if len(text) != length:
        raise _refusal("CKPT-TRUNCATED", file, "the file shrank while it was read")
    return text, 8 + length


def _entry(name: str, found: Any, file: str, data_start: int, size: int) -> TensorInfo:
    check_tensor_name(name, file)
    if not isinstance(found, dict) or set(found) != {"dtype", "shape", "data_offsets"}:
        raise _refusal(
            "CKPT-HEADER", file, "an entry needs exactly dtype, shape and data_offsets", name
        )
    dtype, shape, offsets = found["dtype"], found["shape"], found["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _refusal("CKPT-DTYPE", file, f"dtype {quoted(dtype)} is unknown", name)
    if not _integers(shape, _MAX_DIM) or len(shape) > _MAX_RANK:
        raise _refusal("CKPT-HEADER", file, f"{quoted(shape)} is not a shape", name)
    # A number on its own is no weight, but the scale of a quantised one may be that.
    if 0 in shape or (not shape and "scale" not in name):
        raise _refusal(
            "CKPT-EMPTY",
            file,
            f"shape {shape} holds no vector or matrix, wanted sizes above 0",
            name,
        )
    if not _integers(offsets, 1 << 62) or len(offsets) != 2:
        raise _refusal(
            "CKPT-RANGE", file, f"data_offsets {quoted(offsets)} are no byte range", name
        )
    begin, end = offsets
    wanted = prod(shape) * DTYPE_BITS[dtype] // 8
    if end - begin != wanted:
        raise _refusal(
            "CKPT-RANGE",
            file,
            f"bytes {begin} to {end}, but {dtype} {shape} takes {wanted} bytes",
            name,
        )
    if data_start + end > size:
        raise InputError(
            "CKPT-RANGE",
            f"{quoted(file)} is cut short: tensor {quoted(name)} ends at byte {data_start + end}, "
            f"the file at {size}",
            hint=_INCOMPLETE,
            file=file,
            tensor=name,
        )
    return TensorInfo(name, dtype, tuple(shape), file, data_start + begin, wanted)


def check_tensor_name(name: str, file: str) -> None:
    """Refuse a tensor name that is not printable ASCII or looks like a path.

    Raises: InputError CKPT-NAME.
    """
    plain = 0 < len(name) <= _MAX_NAME and name.isascii() and name.isprintable()
    if not plain or any(mark in name for mark in ("/", "\\", "..", " ")):
        raise _refusal("CKPT-NAME", file, "not a plain tensor name", name)


def _check_ranges(entries: list[TensorInfo], file: str, start: int, size: int) -> None:
    first, last = entries[0], entries[-1]
    if first.offset != start:
        raise _refusal(
            "CKPT-RANGE", file, f"a hole of {first.offset - start} bytes before it", first.name
        )
    for before, after in pairwise(entries):
        gap = after.offset - (before.offset + before.nbytes)
        if gap:
            what = f"a hole of {gap} bytes before it" if gap > 0 else f"overlaps {before.name}"
            raise _refusal("CKPT-RANGE", file, what, after.name)
    end = last.offset + last.nbytes
    if end != size:
        raise InputError(
            "CKPT-RANGE",
            f"{quoted(file)} has {size - end} bytes that no tensor owns, after {quoted(last.name)}",
            hint=_INCOMPLETE,
            file=file,
            tensor=last.name,
        )


def _integers(value: Any, most: int) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v <= most for v in value)


def _refusal(code: str, file: str, reason: str, tensor: str | None = None) -> InputError:
    where = quoted(file) if tensor is None else f"{quoted(file)}, tensor {quoted(tensor)}"
    return InputError(
        code, f"{where}: {reason}", file=file, tensor=quoted(tensor) if tensor else None
    )
