"""The cache of a bundle as its manifest describes it: tensors, their shapes, their bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_deploy import shapes
from mla_deploy.errors import IncompatibleError, quoted
from mla_deploy.latent_store import LatentStore, store_of

Array = NDArray[Any]
# Storage of each dtype: numpy's type (bf16 as its bits) and ONNX's element type.
STORAGE: Mapping[str, tuple[type[np.generic], int]] = {
    "fp32": (np.float32, 1),
    "fp16": (np.float16, 10),
    "bf16": (np.uint16, 16),
    "uint8": (np.uint8, 2),
    "int8": (np.int8, 3),
}


@dataclass(frozen=True)
class CacheTensor:
    """One cache tensor of the graph: its two names, and what it holds.

    `rows` is None for one row a token, a number for a ring of so many rows; a state has no rows.
    `shape` is a row's, or the state's without the batch. `scales` [W]: what static codes are
    multiplied by.
    """

    layer: int
    kind: str
    input: str
    output: str
    shape: tuple[int, ...]
    dtype: str
    rows: int | None = None
    is_state: bool = False
    scales: NDArray[np.float32] | None = field(default=None, compare=False)

    @property
    def width(self) -> int:
        """Elements of one row, or of the state."""
        return prod(self.shape)

    @property
    def is_fixed(self) -> bool:
        """A ring or a state: as large as it is, however many tokens came by."""
        return self.is_state or self.rows is not None

    @property
    def numpy_type(self) -> type[np.generic]:
        return STORAGE[self.dtype][0]

    @property
    def onnx_type(self) -> int:
        return STORAGE[self.dtype][1]

    def fixed_shape(self, batch: int) -> tuple[int, ...]:
        """The whole tensor of a ring [B, 1, rows, W] or a state [B, ...]."""
        between = () if self.is_state else (1, self.rows or 0)
        return (batch, *between, *self.shape)


@dataclass(frozen=True)
class CacheSpec:
    """The cache part of a bundle's manifest. `tensors` holds latents before rope keys per layer.

    `store`: how latents are read that are codes and scales, and rope keys that are.
    """

    tensors: tuple[CacheTensor, ...]
    dtype: str
    grows: bool
    store: LatentStore | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """The cache indices there are, in order."""
        return tuple(sorted({tensor.layer for tensor in self.tensors}))

    def store_of(self, tensor: CacheTensor) -> LatentStore | None:
        """How codes and scales of its kind are read. None: it holds numbers."""
        if self.store is None or tensor.is_fixed:
            return None
        return self.store.of_kind(tensor.kind)

    def bytes(self, batch: int, capacity: int) -> int:
        """Bytes of a cache: batch x (capacity x row, or ring, or state) over all tensors.

        Raises: InputError SHAPE-RANGE, SHAPE-OVERFLOW.
        """
        return sum(
            shapes.checked_product(
                batch,
                1 if t.is_state else t.rows or capacity,
                t.width,
                np.dtype(t.numpy_type).itemsize,
            )
            for t in self.tensors
        )


def spec_from_manifest(manifest: Mapping[str, Any]) -> CacheSpec:
    """Read `io` and `cache`. Raises: IncompatibleError RUN-CACHE (a dtype not known here)."""
    cache, io = manifest["cache"], manifest["io"]
    declared = {str(value["name"]): value for value in io["decode"]["inputs"]}
    tensors = []
    for entry in cache["tensors"]:
        value = declared.get(str(entry["input"]))
        dtype = quoted(None) if value is None else str(value["dtype"])
        if value is None or dtype not in STORAGE:
            raise IncompatibleError(
                "RUN-CACHE",
                f"cache {quoted(entry['input'])} is {dtype}, wanted one of {', '.join(STORAGE)}",
                hint="upgrade mla-deploy, or export again with this release",
            )
        rows, shape = entry["rows"], [int(size) for size in value["shape"] if type(size) is int]
        tensors.append(
            CacheTensor(
                layer=int(entry["layer"]),
                kind=str(entry["kind"]),
                input=str(entry["input"]),
                output=str(entry["output"]),
                shape=tuple(shape) if rows == "state" else tuple(shape[-1:]),
                dtype=dtype,
                rows=rows if type(rows) is int else None,
                is_state=rows == "state",
                scales=np.array(entry["scales"], np.float32) if "scales" in entry else None,
            )
        )
    store = store_of(str(cache["dtype"]))
    return CacheSpec(tuple(tensors), str(cache["dtype"]), cache["kind"] == "growing", store)


def as_float32(values: Array, dtype: str) -> NDArray[np.float32]:
    """Stored elements as fp32; bf16 is the upper half of an fp32."""
    if dtype == "bf16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)
