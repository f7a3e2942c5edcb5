"""A checkpoint folder, opened: config, headers and index checked, tensors read when asked for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from mla_deploy.checkpoint.header import TensorInfo, read_header
from mla_deploy.checkpoint.implied import check_layers, check_shapes
from mla_deploy.checkpoint.index import WeightFiles, check_against_index, find_weight_files
from mla_deploy.checkpoint.shards import Shards
from mla_deploy.config import MlaConfig, config_in
from mla_deploy.door import Folder, open_folder
from mla_deploy.errors import InputError, quoted
from mla_deploy.strict_json import canonical_json

if TYPE_CHECKING:
    import torch

READABLE_DTYPES = ("F32", "F16", "BF16")


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open and check a checkpoint folder; no tensor data is read. A context manager.

    Raises: InputError CFG-*, CKPT-*, FILE-*.
    """
    opened = open_folder(folder)
    shards = Shards(opened)
    try:
        config = config_in(opened)
        weights = find_weight_files(opened)
        tensors = _read_headers(weights, shards)
        check_layers(config, tensors)
        check_shapes(config, tensors)
        return Checkpoint(opened, shards, config, weights, tensors)
    except BaseException:
        shards.close()
        opened.close()
        raise


class Checkpoint:
    """Named tensors of an open folder. `notes` are warnings for the user's report."""

    def __init__(
        self,
        folder: Folder,
        shards: Shards,
        config: MlaConfig,
        weights: WeightFiles,
        tensors: Mapping[str, TensorInfo],
    ) -> None:
        self.folder = folder.path
        self.config = config
        self.tensors = tensors
        self.files = weights.files
        self.total_bytes = sum(info.nbytes for info in tensors.values())
        self.notes = config.notes + weights.notes + self._size_notes(weights)
        self.digest = _digest(config, shards, weights.files, tensors)
        self._opened = folder
        self._shards = shards

    def read(self, name: str, rows: slice | None = None, index: int | None = None) -> torch.Tensor:
        """The tensor `name`, or a part of it, in its dtype on disk; finite.

        `index` selects along the first axis (one expert of a fused tensor), `rows` then slices
        what is left. Only those bytes are read.
        Raises: InputError CKPT-MISSING, CKPT-DTYPE, CKPT-SLICE, CKPT-TRUNCATED, CKPT-NONFINITE;
        IntegrityError CKPT-CHANGED.
        """
        from mla_deploy.checkpoint.values import read_values

        info = self.tensors.get(name)
        if info is None:
            raise InputError("CKPT-MISSING", f"there is no tensor {quoted(name)}", tensor=name)
        if info.dtype not in READABLE_DTYPES:
            raise unreadable_dtype(info)
        return read_values(self._shards, info, rows, index)

    def duplicate(self, file: str) -> int:
        """A descriptor of a weight file, the one whose header was checked; the caller closes it.

        Raises: IntegrityError CKPT-CHANGED.
        """
        return self._shards.duplicate(file)

    def close(self) -> None:
        """Close every file; closing twice is allowed."""
        self._shards.close()
        self._opened.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _size_notes(self, weights: WeightFiles) -> tuple[str, ...]:
        # A note and no refusal: published indexes are known to carry the size of another dtype.
        if weights.total_size is None or weights.total_size == self.total_bytes:
            return ()
        return (
            f"the index says total_size {weights.total_size}, the tensors take {self.total_bytes}",
        )


def unreadable_dtype(info: TensorInfo) -> InputError:
    """The refusal of a tensor whose dtype is not one of `READABLE_DTYPES`."""
    fp8 = info.dtype.startswith("F8")
    return InputError(
        "CKPT-DTYPE",
        f"{quoted(info.name)} is {info.dtype}, wanted {', '.join(READABLE_DTYPES)}"
        + (": FP8 weights are not read yet" if fp8 else ""),
        hint="use or make a bf16 version of the checkpoint" if fp8 else "",
        tensor=info.name,
        file=info.file,
    )


def _read_headers(weights: WeightFiles, shards: Shards) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file in weights.files:
        descriptor = shards.duplicate(file)
        try:
            found = read_header(descriptor, file)
        finally:
            os.close(descriptor)
        for info in found:
            if info.name in tensors:
                raise InputError(
                    "CKPT-DUPLICATE",
                    f"{quoted(info.name)} stands in {quoted(tensors[info.name].file)} and in "
                    f"{quoted(file)}",
                    hint="index and shards are of different revisions; fetch both again",
                    tensor=info.name,
                )
            if info.dtype.startswith("F8"):
                raise unreadable_dtype(info)
            tensors[info.name] = info
    if weights.promised is not None:
        check_against_index(tensors.values(), weights.promised)
    return tensors


def _digest(
    config: MlaConfig, shards: Shards, files: tuple[str, ...], tensors: Mapping[str, TensorInfo]
) -> str:
    """sha256 over config digest, file sizes and every header entry; the data are not read."""
    content = {
        "config": config.digest,
        "files": [[file, shards.size(file)] for file in files],
        "tensors": [
            [info.name, info.dtype, info.shape, info.file, info.offset]
            for _, info in sorted(tensors.items())
        ],
    }
    return hashlib.sha256(canonical_json(content)).hexdigest()
