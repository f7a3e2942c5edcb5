"""A checkpoint folder, opened: config, headers and index checked, tensors read when asked for.

What is quantised on disk is shown as the float weight it stands for (`quantized/`), so that no one
else need know.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_deploy.checkpoint.header import TensorInfo, read_header
from mla_deploy.checkpoint.implied import check_layers, check_shapes
from mla_deploy.checkpoint.index import WeightFiles, check_against_index, find_weight_files
from mla_deploy.checkpoint.quantized import Inventory, read_quantized, take_inventory
from mla_deploy.checkpoint.shards import Shards
from mla_deploy.config import MlaConfig, config_in
from mla_deploy.door import Folder, open_folder
from mla_deploy.errors import InputError, quoted
from mla_deploy.quantization import WeightScheme
from mla_deploy.strict_json import canonical_json

if TYPE_CHECKING:
    import torch

READABLE_DTYPES = ("F32", "F16", "BF16")


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open and check a checkpoint folder; no weight is read. A context manager.

    Raises: InputError CFG-*, CKPT-*, FILE-*.
    """
    opened = open_folder(folder)
    shards = Shards(opened)
    try:
        config = config_in(opened)
        weights = find_weight_files(opened)
        inventory = take_inventory(read_headers(weights, shards), config, shards)
        check_layers(config, inventory.tensors)
        check_shapes(config, inventory.tensors)
        return Checkpoint(opened, shards, config, weights, inventory)
    except BaseException:
        shards.close()
        opened.close()
        raise


class Checkpoint:
    """Named tensors of an open folder. `notes` are warnings for the user's report.

    `tensors`: the weights; a quantised one counts as float32 and has no single place on disk.
    `stored`: what the files hold, parts of quantised weights one by one.
    """

    def __init__(
        self,
        folder: Folder,
        shards: Shards,
        config: MlaConfig,
        weights: WeightFiles,
        inventory: Inventory,
    ) -> None:
        self.folder = folder.path
        self.config = config
        self.tensors = inventory.tensors
        self.stored = inventory.stored
        self.files = weights.files
        self.total_bytes = sum(info.nbytes for info in self.stored.values())
        self.notes = config.notes + weights.notes + inventory.notes + self._size_notes(weights)
        self.digest = _digest(config, shards, weights.files, self.stored)
        self._quantized = inventory.quantized
        self._opened = folder
        self._shards = shards

    def read(self, name: str, rows: slice | None = None, index: int | None = None) -> torch.Tensor:
        """The tensor `name`, or a part of it, finite; in its dtype on disk, float32 if quantised.

        `index` selects along the first axis (one expert of a fused tensor), `rows` then slices
        what is left. Only those bytes, and the scales that belong to them, are read.
        Raises: InputError CKPT-MISSING, CKPT-DTYPE, CKPT-SLICE, CKPT-TRUNCATED, CKPT-NONFINITE,
        CKPT-PART-VALUE; IntegrityError CKPT-CHANGED.
        """
        from mla_deploy.checkpoint.values import read_values

        info = self._known(name)
        if name in self._quantized:
            return read_quantized(self._shards, self._quantized[name], rows, index)
        if info.dtype not in READABLE_DTYPES:
            raise unreadable_dtype(info)
        return read_values(self._shards, info, rows, index)

    def read_stored(
        self, name: str, first: int, shape: tuple[int, ...], out: memoryview | None = None
    ) -> torch.Tensor:
        """`shape` neighbouring values of a tensor of `stored`, from value `first` on, finite; in
        its dtype on disk, what it is scaled by left out. They lie in `out` where it is given.

        Raises: InputError CKPT-MISSING, CKPT-SLICE, CKPT-TRUNCATED, CKPT-NONFINITE;
        IntegrityError CKPT-CHANGED.
        """
        from mla_deploy.checkpoint.values import check_finite, read_raw

        info = self.stored.get(name)
        if info is None:
            raise InputError("CKPT-MISSING", f"there is no tensor {quoted(name)}", tensor=name)
        if not 0 <= first <= first + prod(shape) <= prod(info.shape):
            raise InputError(
                "CKPT-SLICE", f"{shape} values of {quoted(name)} from {first} on are outside it"
            )
        values = read_raw(self._shards, info, first, shape, out)
        check_finite(values, info)
        return values

    def duplicate(self, file: str) -> int:
        """A descriptor of a weight file, the one whose header was checked; the caller closes it.

        Raises: IntegrityError CKPT-CHANGED.
        """
        return self._shards.duplicate(file)

    def parts(self, name: str) -> Mapping[str, TensorInfo]:
        """What a weight is made of on disk: role -> tensor. A plain one is its own `values`.

        The roles of a quantised one: see `QuantizedTensor`.
        Raises: InputError CKPT-MISSING.
        """
        info = self._known(name)
        return self._quantized[name].parts if name in self._quantized else {"values": info}

    def scheme(self, name: str) -> WeightScheme | None:
        """How a weight is quantised on disk, None if it is not.

        Raises: InputError CKPT-MISSING.
        """
        self._known(name)
        return self._quantized[name].scheme if name in self._quantized else None

    def _known(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise InputError("CKPT-MISSING", f"there is no tensor {quoted(name)}", tensor=name)
        return info

    def close(self) -> None:
        """Close every file; closing twice is allowed."""
        self._shards.close()
        self._opened.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
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
    return InputError(
        "CKPT-DTYPE",
        f"{quoted(info.name)} is {info.dtype}, wanted {', '.join(READABLE_DTYPES)}",
        hint="if it is part of a quantised weight, its other parts or quantization_config in "
        "config.json are missing",
        tensor=info.name,
        file=info.file,
    )


def read_headers(weights: WeightFiles, shards: Shards) -> dict[str, TensorInfo]:
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
            tensors[info.name] = info
    if weights.promised is not None:
        check_against_index(tensors.values(), weights.promised)
    return tensors


def _digest(
    config: MlaConfig, shards: Shards, files: tuple[str, ...], tensors: Mapping[str, TensorInfo]
) -> str:
    """sha256 over config digest, file sizes and every header entry; the data are not read."""
    content: dict[str, Any] = {
        "config": config.digest,
        "files": [[file, shards.size(file)] for file in files],
        "tensors": [
            [info.name, info.dtype, info.shape, info.file, info.offset]
            for _, info in sorted(tensors.items())
        ],
    }
    if config.quantization is not None:
        content["schemes"] = [asdict(scheme) for scheme in config.quantization.schemes]
    return hashlib.sha256(canonical_json(content)).hexdigest()
