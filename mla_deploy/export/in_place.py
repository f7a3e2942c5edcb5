"""Weights that stay where they are: initializers that point into the checkpoint's own files.

A weight stays when one contiguous range of one file holds it, in whatever float dtype, or as eight
bits with scales beside it. What is made from a tensor (the absorbed halves of kv_b_proj, stacked
weights, four-bit ones) is streamed to the bundle's own weight file as ever. `widen.py` then sees
to it that the graph, which computes in fp32, reads each weight in the form that it has on disk.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import onnx_ir as ir

from mla_deploy.bundle import CheckpointFile, header_bytes, record_of_start
from mla_deploy.bundle.checkpoint_files import VERIFIED
from mla_deploy.checkpoint import Checkpoint, TensorInfo, TensorSlice, WeightMap
from mla_deploy.door import Folder, open_folder
from mla_deploy.errors import InputError, quoted
from mla_deploy.export.scales import Blocks
from mla_deploy.export.weights import StoredWeight, WeightLayout

DTYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}  # on disk -> as an option
# What a graph can read of a weight with scales: the values themselves, and then the scales.
VALUES, SCALES = {"F8_E4M3": "fp8", "I8": "int8"}, tuple(DTYPES)
_MAX_FILES = 500
_OUT_HINT = "export with --out instead: it copies what it needs"


@dataclass(frozen=True)
class OnDisk:
    """A byte range of a checkpoint file that holds one tensor, row by row.

    `scale` and `blocks` belong to values that are nothing without them.
    """

    file: str
    offset: int
    nbytes: int
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]
    scale: OnDisk | None = None
    blocks: Blocks | None = None
    tensor: str = field(default="", compare=False)  # that it is, or is a part of

    @property
    def form(self) -> tuple[str, Blocks | None] | None:
        """What a graph has to do to read it, but for a cast; None: nothing."""
        return None if self.blocks is None else (self.dtype, self.blocks)


Kept = dict[str, OnDisk]  # by the name of the initializer


def own_dtype(source: Checkpoint, asked: str | None) -> str:
    """The dtype that most of the checkpoint's weights have: in place, they keep it.

    Raises: InputError EXP-IN-PLACE when another one is asked for.
    """
    found = commonest_dtype(source)
    if asked not in (None, found):
        raise InputError(
            "EXP-IN-PLACE",
            f"dtype is {asked}, the checkpoint's weights are {found} and stay so in place",
            hint=f"leave --dtype out, or {_OUT_HINT}",
        )
    return found


def commonest_dtype(source: Checkpoint) -> str:
    """The float dtype of most bytes of the checkpoint, as an option; bf16 where there is none."""
    sizes: Counter[str] = Counter()
    for info in source.stored.values():
        if info.dtype in DTYPES:
            sizes[DTYPES[info.dtype]] += info.nbytes
    return sizes.most_common(1)[0][0] if sizes else "bf16"


def require_plain_files(source: Checkpoint) -> None:
    """Refuse a checkpoint whose files ONNX would not read, before anything slow is done.

    Raises: InputError EXP-IN-PLACE.
    """
    if len(source.files) > _MAX_FILES:
        raise _unfit(f"it has {len(source.files)} weight files, wanted at most {_MAX_FILES}")
    with open_folder(source.folder) as folder:
        for name in source.files:
            os.close(_open(folder, name))


def keep(layout: WeightLayout, weights: WeightMap, models: Sequence[ir.Model]) -> Kept:
    """Take out of `layout` what need not be written; where each of those lies.

    Layers of one kind share a function, so a weight stays quantised when it does in all of them.
    What is written is written exactly: weights of an in-place bundle are the checkpoint's own.
    """
    kept = {}
    for name, stored in layout.weights.items():
        place = _place(stored, weights)
        if place is not None:
            kept[name] = place
    for model in models:
        for names in _arguments_of_functions(model):
            if len({kept[name].form if name in kept else None for name in names}) > 1:
                _drop_quantized(kept, names)
    for name, stored in list(layout.weights.items()):
        if name in kept:
            del layout.weights[name]
        elif DTYPES.get(weights.slices[stored.use.parameter].dtype) != stored.dtype:
            layout.weights[name] = replace(stored, dtype="fp32")
    return kept


def _arguments_of_functions(model: ir.Model) -> Iterator[set[str]]:
    """The initializers that one parameter of a model-local function is called with, by name."""
    found: dict[tuple[ir.OperatorIdentifier, int], set[str]] = {}
    for node in model.graph:
        if node.op_identifier() in model.functions:
            for index, value in enumerate(node.inputs):
                if value is not None and value.is_initializer():
                    key = (node.op_identifier(), index)
                    found.setdefault(key, set()).add(str(value.name))
    yield from found.values()


def _drop_quantized(kept: Kept, names: Iterable[str]) -> None:
    for name in names:
        if name in kept and kept[name].blocks is not None:
            del kept[name]


def files_section(source: Checkpoint, texts: Iterable[str], kept: Kept) -> dict[str, Any]:
    """The manifest's `in_place`: the checkpoint's files that the bundle needs, and how they were
    recorded.

    Raises: InputError EXP-IN-PLACE, FILE-*; IntegrityError CKPT-CHANGED.
    """
    records: dict[str, CheckpointFile] = {}
    with open_folder(source.folder) as folder:
        for name in sorted({name for name in texts if name in folder.names()}):
            records[name] = _recorded(_open(folder, name), whole=True)
    places = [p for place in kept.values() for p in (place, place.scale) if p is not None]
    for name in sorted({place.file for place in places}):
        records[name] = _recorded(source.duplicate(name), whole=False)
    return {
        "files": {name: record.to_dict() for name, record in records.items()},
        "tensors": len(kept),
        "bytes": sum(place.nbytes for place in places),
        "verified": VERIFIED,
    }


def _place(stored: StoredWeight, weights: WeightMap) -> OnDisk | None:
    """Where a weight lies whole; None when it has to be made."""
    part = weights.slices.get(stored.use.parameter)
    if stored.use.half is not None or not isinstance(part, TensorSlice):
        return None
    if part.shape != stored.shape:
        return None
    scheme = weights.checkpoint.scheme(part.tensor)
    parts = weights.checkpoint.parts(part.tensor)
    if scheme is not None:
        return _quantized_place(part, parts, scheme.block)
    values = parts["values"]
    return _range(values, part) if values.dtype in DTYPES else None


def _quantized_place(
    part: TensorSlice, parts: Mapping[str, TensorInfo], block: tuple[int, int]
) -> OnDisk | None:
    """As `_place`, of values with scales that a graph can read so."""
    values, scale = parts["values"], parts.get("scale")
    if scale is None or len(parts) != 2 or len(part.shape) != 2:
        return None
    if values.dtype not in VALUES or scale.dtype not in SCALES:
        return None
    # A block as large as the matrix is all of it, however its grid of one is written.
    rows, columns = (0 if b >= s else b for b, s in zip(block, part.shape, strict=True))
    blocks = Blocks(rows, columns)
    place, beside = _range(values, part), _scale_range(values, scale, part, block[0])
    if place is None or beside is None or prod(beside.shape) != blocks.count(part.shape):
        return None
    return replace(place, scale=beside, blocks=blocks)


def _scale_range(
    values: TensorInfo, scale: TensorInfo, part: TensorSlice, block: int
) -> OnDisk | None:
    """The scales of a part; None where it begins inside a block."""
    if part.index is None and part.rows is None:
        return _range(scale, TensorSlice(scale.name, None, None, scale.shape, scale.dtype))
    if len(scale.shape) != len(values.shape):
        return None
    first, last = part.rows or (0, part.shape[0])
    height = last - first
    block = block or height
    down, whole = -(-height // block), values.shape[-2]
    if scale.shape[-2] == -(-whole // block) and first % block == 0:
        start = first // block
    elif scale.shape[-2] == whole // height * down:  # each part has a last block of its own
        start = first // height * down
    else:
        return None
    rows = (start, start + down)
    shape = (down, scale.shape[-1])
    return _range(scale, TensorSlice(scale.name, part.index, rows, shape, scale.dtype))


def _range(info: TensorInfo, part: TensorSlice) -> OnDisk | None:
    """The bytes of a part of a tensor; None where a processor may refuse to load a number."""
    itemsize = info.nbytes // prod(info.shape)
    offset = info.offset + part.first_value(info.shape) * itemsize
    if offset % itemsize:
        return None
    nbytes = prod(part.shape) * itemsize
    return OnDisk(info.file, offset, nbytes, info.dtype, part.shape, tensor=info.name)


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
