"""The weight file of a bundle, opened: tensors by name."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from mla_deploy.bundle import Bundle
from mla_deploy.checkpoint.header import TensorInfo, read_header
from mla_deploy.checkpoint.shards import Shards
from mla_deploy.checkpoint.values import read_values
from mla_deploy.door import open_folder


class WeightFile:
    """Open until it is closed. `tensors`: what is there, by name."""

    def __init__(self, bundle: Bundle) -> None:
        """Raises: IntegrityError BUN-CHANGED, InputError CKPT-*."""
        file = bundle.file(str(bundle.manifest["weights"]["file"])).name
        self._opened = open_folder(bundle.path)
        self._shards = Shards(self._opened)
        descriptor = self._shards.duplicate(file)
        try:
            self.tensors: Mapping[str, TensorInfo] = {
                info.name: info for info in read_header(descriptor, file)
            }
        finally:
            os.close(descriptor)

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """A tensor of `tensors`, or rows of it. Raises: as `Checkpoint.read`."""
        return read_values(self._shards, self.tensors[name], rows, None)

    def close(self) -> None:
        self._shards.close()
        self._opened.close()
