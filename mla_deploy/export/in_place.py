"""Weights that stay where they are: initializers that point into the checkpoint's own files.

A weight stays when one contiguous range of one file holds it, in whatever dtype. What is made from
a tensor (the absorbed halves of kv_b_proj, stacked or converted weights) is streamed to the
bundle's own weight file as ever. `widen.py` then sees to it that the graph, which computes in
fp32, reads each weight in the dtype that it has on disk.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

from mla_deploy.bundle import CheckpointFile, header_bytes, record_of_start
from mla_deploy.bundle.checkpoint_files import VERIFIED
from mla_deploy.checkpoint import Checkpoint, TensorSlice, WeightMap
from mla_deploy.door import Folder, open_folder
from mla_deploy.errors import InputError, quoted
from mla_deploy.export.weights import StoredWeight, WeightLayout

DTYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}  # on disk -> as an option
_MAX_FILES = 500
_OUT_HINT = "export with --out instead: it copies what it needs"


@dataclass(frozen=True)
class OnDisk:
    """A byte range of a checkpoint file that holds one weight, row by row."""

    file: str
    offset: int
    nbytes: int
    dtype: str  # fp32 | fp16 | bf16
    shape: tuple[int, ...]


def own_dtype(source: Checkpoint, asked: str | None) -> str:
    """The dtype that most of the checkpoint's weights have: in place, they keep it.

    Raises: InputError EXP-IN-PLACE when another one is asked for.
    """
    sizes: Counter[str] = Counter()
    for info in source.tensors.values():
        if info.dtype in DTYPES:
            sizes[DTYPES[info.dtype]] += info.nbytes
    found = sizes.most_common(1)[0][0] if sizes else "bf16"
    if asked not in (None, found):
        raise InputError(
            "EXP-IN-PLACE",
            f"dtype is {asked}, the checkpoint's weights are {found} and stay so in place",
            hint=f"leave --dtype out, or {_OUT_HINT}",
        )
    return found


def require_plain_files(source: Checkpoint) -> None:
    """Refuse a checkpoint whose files ONNX would not read, before anything slow is done.

    Raises: InputError EXP-IN-PLACE.
    """
    if len(source.files) > _MAX_FILES:
        raise _unfit(f"it has {len(source.files)} weight files, wanted at most {_MAX_FILES}")
    with open_folder(source.folder) as folder:
        for name in source.files:
            os.close(_open(folder, name))


def keep(layout: WeightLayout, weights: WeightMap) -> dict[str, OnDisk]:
    """Take out of `layout` what need not be written; where each of those lies."""
    kept = {}
    for name, stored in list(layout.weights.items()):
        place = _place(stored, weights)
        if place is not None:
            kept[name] = place
            del layout.weights[name]
    return kept


def files_section(
    source: Checkpoint, texts: Iterable[str], kept: dict[str, OnDisk]
) -> dict[str, Any]:
    """The manifest's `in_place`: the checkpoint's files that the bundle needs, and how they were
    recorded.

    Raises: InputError EXP-IN-PLACE, FILE-*; IntegrityError CKPT-CHANGED.
    """
    records: dict[str, CheckpointFile] = {}
    with open_folder(source.folder) as folder:
        for name in sorted({name for name in texts if name in folder.names()}):
            records[name] = _recorded(_open(folder, name), whole=True)
    for name in sorted({place.file for place in kept.values()}):
        records[name] = _recorded(source.duplicate(name), whole=False)
    return {
        "files": {name: record.to_dict() for name, record in records.items()},
        "tensors": len(kept),
        "bytes": sum(place.nbytes for place in kept.values()),
        "verified": VERIFIED,
    }


def _place(stored: StoredWeight, weights: WeightMap) -> OnDisk | None:
    """Where a weight lies whole; None when it has to be made."""
    part = weights.slices.get(stored.use.parameter)
    if stored.use.half is not None or not isinstance(part, TensorSlice):
        return None
    info = weights.checkpoint.tensors[part.tensor]
    if info.dtype not in DTYPES or part.shape != stored.shape:
        return None
    itemsize = info.nbytes // prod(info.shape)
    offset = info.offset
    if part.index is not None:
        offset += part.index * prod(info.shape[1:]) * itemsize
    if part.rows is not None:
        offset += part.rows[0] * prod(part.shape[1:]) * itemsize
    if offset % itemsize:
        return None  # a processor may refuse to load a number from there
    nbytes = prod(part.shape) * itemsize
    return OnDisk(info.file, offset, nbytes, DTYPES[info.dtype], part.shape)


def _recorded(descriptor: int, *, whole: bool) -> CheckpointFile:
    try:
        return record_of_start(descriptor, None if whole else header_bytes(descriptor))
    finally:
        os.close(descriptor)


def _open(folder: Folder, name: str) -> int:
    """A file that is no link: through one, ONNX reads no weights, and a bundle no texts."""
    try:
        return folder.open(name, "bundle")
    except InputError as error:
        raise _unfit(error.message) from None


def _unfit(reason: str) -> InputError:
    return InputError(
        "EXP-IN-PLACE",
        f"no bundle can stand beside this checkpoint: {reason}",
        hint=f"copy the checkpoint's files into a folder of their own, or {_OUT_HINT}",
        reason=quoted(reason),
    )
