"""The latent cache of one runner: buffers reserved up front, bound to the graph as windows.

An in-place graph computes over every token slot that is bound, so what is bound is a window of
the buffer, not its capacity. Rows lie one behind the other at a stride of T tokens:

    batch 1    T = length + new: the exact prefix, no slot more
    batch > 1  T grows in blocks; the rows are moved apart inside the same buffer, last row first

Bytes reserved: layers x batch x capacity x (L + R) x itemsize, whatever T is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_deploy import shapes
from mla_deploy.errors import EnvironmentFailure, IncompatibleError, quoted

Array = NDArray[Any]
# Storage of each dtype: numpy's type (bf16 as its bits) and ONNX's element type.
STORAGE: Mapping[str, tuple[type[np.generic], int]] = {
    "fp32": (np.float32, 1),
    "fp16": (np.float16, 10),
    "bf16": (np.uint16, 16),
}
# Tokens by which a window of several rows grows. A move costs about one read of the cache, so a
# small block is dear only when the cache is large.
_SMALL_BLOCK = 64
_LARGE_BLOCK = 256
_LARGE_FROM = 1024


@dataclass(frozen=True)
class CacheTensor:
    """One cache tensor of the graph: which layer's, its two names, and its width in elements."""

    layer: int
    input: str
    output: str
    width: int


@dataclass(frozen=True)
class CacheSpec:
    """The cache part of a bundle's manifest. `tensors` holds latents before rope keys per layer."""

    tensors: tuple[CacheTensor, ...]
    dtype: str
    grows: bool

    @property
    def row_width(self) -> int:
        """Elements per token and layer, L + R."""
        return sum(tensor.width for tensor in self.tensors if tensor.layer == 0)

    @property
    def num_layers(self) -> int:
        return 1 + max(tensor.layer for tensor in self.tensors)

    @property
    def numpy_type(self) -> type[np.generic]:
        return STORAGE[self.dtype][0]

    @property
    def onnx_type(self) -> int:
        return STORAGE[self.dtype][1]


@dataclass(frozen=True)
class Window:
    """What one step binds: arrays [B, 1, T, W] in the order of `CacheSpec.tensors`."""

    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]


def spec_from_manifest(manifest: Mapping[str, Any]) -> CacheSpec:
    """Read `io` and `cache`. Raises: IncompatibleError RUN-CACHE (a dtype not known here)."""
    cache, io = manifest["cache"], manifest["io"]
    if cache["dtype"] not in STORAGE:
        raise IncompatibleError(
            "RUN-CACHE",
            f"the cache is {quoted(cache['dtype'])}, wanted one of {', '.join(STORAGE)}",
            hint="upgrade mla-deploy, or export again with this release",
        )
    output_of = {str(pair[0]): str(pair[1]) for pair in io["alias"]}
    outputs = [str(value["name"]) for value in io["decode"]["outputs"] if value["kind"] != "logits"]
    tensors = []
    entries = [value for value in io["decode"]["inputs"] if str(value["kind"]).endswith("_cache")]
    for value, output in zip(entries, outputs, strict=True):
        name = str(value["name"])
        layer = int(name.rpartition(".")[2])
        tensors.append(
            CacheTensor(layer, name, output_of.get(name, output), int(value["shape"][-1]))
        )
    # Latents sort before rope keys by name, as they do in a row.
    tensors.sort(key=lambda tensor: (tensor.layer, tensor.input))
    return CacheSpec(tuple(tensors), str(cache["dtype"]), cache["kind"] == "growing")


class InPlaceCache:
    """One flat buffer per cache tensor; a window is a view of its front."""

    def __init__(self, spec: CacheSpec, batch: int, capacity: int) -> None:
        """Reserve every buffer. Zero pages cost no memory until they are written.

        Raises: InputError SHAPE-OVERFLOW, EnvironmentFailure RUN-MEMORY.
        """
        self.spec, self.batch, self.capacity = spec, batch, capacity
        self._stride_tokens = 0
        self._buffers = _reserved(spec, batch, capacity)

    @property
    def bytes(self) -> int:
        """Bytes of the bound buffers, as numpy reports them."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def window(
        self, lengths_B: NDArray[np.int64], new_B: NDArray[np.int64], new_tokens: int
    ) -> Window:
        """Views that have room for `new_B` more tokens per row; moves rows apart where needed.

        Padding (up to `new_tokens`) needs no slot of its own.
        """
        needed = max(1, int((lengths_B + new_B).max()))  # an idle row at length 0 has slot 0
        if self.batch == 1:
            self._stride_tokens = needed
        elif needed > self._stride_tokens:
            self._restride(min(_rounded(needed), self.capacity), lengths_B)
        views = tuple(
            self._rows(buffer, tensor.width)
            for buffer, tensor in zip(self._buffers, self.spec.tensors, strict=True)
        )
        return Window(views, views)

    def poison(self) -> None:
        """Fill every slot with NaN (all bits set, in every dtype), before anything is cached."""
        for buffer in self._buffers:
            buffer.view(np.uint8).fill(0xFF)

    def accept(self, window: Window) -> None:
        """The step that bound `window` succeeded; in place there is nothing to keep."""

    def reset(self) -> None:
        self._stride_tokens = 0

    def cached_rows(self, layer: int, row: int, length: int) -> NDArray[np.float32]:
        """fp32 [length, L + R] of one row."""
        parts = [
            self._rows(buffer, tensor.width)[row, 0, :length]
            for buffer, tensor in zip(self._buffers, self.spec.tensors, strict=True)
            if tensor.layer == layer
        ]
        return np.concatenate([as_float32(part, self.spec.dtype) for part in parts], axis=-1)

    def _rows(self, buffer: Array, width: int) -> Array:
        used = self.batch * self._stride_tokens * width
        return buffer[:used].reshape(self.batch, 1, self._stride_tokens, width)

    def _restride(self, stride_tokens: int, lengths_B: NDArray[np.int64]) -> None:
        """Move each row from the old stride to a wider one, the last row first.

        Row b moves from b*old to b*new >= b*old, so it can only land on rows already moved.
        """
        old = self._stride_tokens
        for buffer, tensor in zip(self._buffers, self.spec.tensors, strict=True):
            for row in reversed(range(1, self.batch)):
                count = int(lengths_B[row]) * tensor.width
                source, target = row * old * tensor.width, row * stride_tokens * tensor.width
                buffer[target : target + count] = buffer[source : source + count]
        self._stride_tokens = stride_tokens


class GrowingCache:
    """The graph returns past plus new as fresh tensors; the last ones are the cache."""

    def __init__(self, spec: CacheSpec, batch: int, capacity: int) -> None:
        self.spec, self.batch, self.capacity = spec, batch, capacity
        self._arrays = self._empty(0)

    @property
    def bytes(self) -> int:
        """Bytes of the tensors held now: they grow with the longest row."""
        return sum(array.nbytes for array in self._arrays)

    def window(
        self, lengths_B: NDArray[np.int64], new_B: NDArray[np.int64], new_tokens: int
    ) -> Window:
        """The past as it stands, and fresh tensors with `new_tokens` slots more."""
        past = int(lengths_B.max())
        if self._arrays[0].shape[2] > past:
            # Rows of unequal length left slots behind the longest row.
            self._arrays = tuple(np.ascontiguousarray(a[:, :, :past]) for a in self._arrays)
        return Window(self._arrays, self._empty(past + new_tokens))

    def poison(self) -> None:
        """Nothing to poison: the graph itself makes every slot that is not written."""

    def accept(self, window: Window) -> None:
        """The step succeeded: its outputs are the cache now."""
        self._arrays = window.outputs

    def reset(self) -> None:
        self._arrays = self._empty(0)

    def cached_rows(self, layer: int, row: int, length: int) -> NDArray[np.float32]:
        """fp32 [length, L + R] of one row."""
        parts = [
            array[row, 0, :length]
            for array, tensor in zip(self._arrays, self.spec.tensors, strict=True)
            if tensor.layer == layer
        ]
        return np.concatenate([as_float32(part, self.spec.dtype) for part in parts], axis=-1)

    def _empty(self, tokens: int) -> tuple[Array, ...]:
        return tuple(
            np.empty((self.batch, 1, tokens, tensor.width), self.spec.numpy_type)
            for tensor in self.spec.tensors
        )


LatentCache = InPlaceCache | GrowingCache


def open_cache(spec: CacheSpec, batch: int, capacity: int) -> LatentCache:
    """The cache of the kind that the bundle's graphs take."""
    return (GrowingCache if spec.grows else InPlaceCache)(spec, batch, capacity)


def as_float32(values: Array, dtype: str) -> NDArray[np.float32]:
    """Stored elements as fp32; bf16 is the upper half of an fp32."""
    if dtype == "bf16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _reserved(spec: CacheSpec, batch: int, capacity: int) -> tuple[Array, ...]:
    itemsize = np.dtype(spec.numpy_type).itemsize
    wanted = shapes.cache_bytes(
        num_layers=spec.num_layers,
        batch=batch,
        capacity=capacity,
        row_width=spec.row_width,
        itemsize=itemsize,
    )
    try:
        return tuple(
            np.zeros(batch * capacity * tensor.width, spec.numpy_type) for tensor in spec.tensors
        )
    except MemoryError:
        raise EnvironmentFailure(
            "RUN-MEMORY",
            f"no memory for a cache of {wanted} bytes ({batch} rows of {capacity} tokens)",
            hint="open the runner with a smaller capacity or batch, or export with --dtype fp16",
            cache_bytes=wanted,
        ) from None


def _rounded(tokens: int) -> int:
    block = _SMALL_BLOCK if tokens < _LARGE_FROM else _LARGE_BLOCK
    return -(-tokens // block) * block
