"""The latent cache of one runner: buffers reserved up front, bound to the graph as windows.

An in-place graph computes over every token slot that is bound, so what is bound is a window of
the buffer, not its capacity. Rows lie one behind the other at a stride of T tokens:

    batch 1    T = length + new: the exact prefix, no slot more
    batch > 1  T grows in blocks; the rows are moved apart inside the same buffer, last row first,
               and closer again when the rows that needed so much are gone
    codes      T grows in the blocks that their products take, with one row as well

Bytes reserved: layers x batch x capacity x (L + R) x itemsize, whatever T is. Rings and states are
bound whole (`fixed_tensors.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mla_deploy.errors import EnvironmentFailure
from mla_deploy.latent_store import BLOCKS
from mla_deploy.runtime.cache_spec import Array, CacheSpec, CacheTensor, as_float32
from mla_deploy.runtime.fixed_tensors import FixedTensors
from mla_deploy.source.latent_values import decode

# Tokens by which a window of several rows grows. A move costs about one read of the cache, so a
# small block is dear only when the cache is large.
_SMALL_BLOCK = 64
_LARGE_BLOCK = 256
_LARGE_FROM = 1024
_WIDEST_FROM = 8192  # from there on codes are bound in the wider of their blocks
_FINITE_BYTE = 0x42  # in every byte: 48.6 in fp32, 3.1 in fp16, 48.5 in bf16


@dataclass(frozen=True)
class Window:
    """What one step binds: arrays in the order of `CacheSpec.tensors`."""

    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]


class InPlaceCache:
    """One flat buffer per tensor with a row for every token; a window is a view of its front."""

    has_row_windows = True  # one row of several can be bound alone, where it lies

    def __init__(self, spec: CacheSpec, batch: int, capacity: int) -> None:
        """Reserve every buffer. Zero pages cost no memory until they are written.

        Raises: InputError SHAPE-OVERFLOW, EnvironmentFailure RUN-MEMORY.
        """
        self.spec, self.batch, self.capacity = spec, batch, capacity
        self._stride_tokens = 0
        self._buffers = _reserved(spec, batch, capacity)
        self.fixed = FixedTensors(spec, batch)

    @property
    def bytes(self) -> int:
        """Bytes of the bound buffers, as numpy reports them."""
        return sum(buffer.nbytes for buffer in self._buffers) + self.fixed.bytes

    def window(
        self, lengths_B: NDArray[np.int64], new_B: NDArray[np.int64], new_tokens: int
    ) -> Window:
        """Views that have room for `new_B` more tokens per row; moves rows apart where needed.

        Padding (up to `new_tokens`) needs no slot of its own.
        """
        needed = max(1, int((lengths_B + new_B).max()))  # an idle row at length 0 has slot 0
        if self.batch == 1:
            self._stride_tokens = self._bound(needed)
        elif needed > self._stride_tokens or 2 * self._wider(needed) <= self._stride_tokens:
            self._restride(min(self._wider(needed), self.capacity), lengths_B)
        views = [
            self._rows(buffer, tensor)
            for buffer, tensor in zip(self._buffers, self.spec.tensors, strict=True)
        ]
        return _window(views, views, self.fixed)

    def row_window(self, row: int, lengths_B: NDArray[np.int64], new_tokens: int) -> Window:
        """As `window`, of one row of several alone: what a cache of one row binds."""
        tokens = self._bound(max(1, int(lengths_B[row]) + new_tokens))
        if tokens > self._stride_tokens:
            self._restride(min(self._wider(tokens), self.capacity), lengths_B)
        views = [
            self._rows(buffer, tensor)
            if tensor.is_fixed
            else self._rows(buffer, tensor)[row : row + 1, :, :tokens]
            for buffer, tensor in zip(self._buffers, self.spec.tensors, strict=True)
        ]
        return _window(views, views, self.fixed, slice(row, row + 1))

    def poison(self) -> None:
        """Fill every slot with NaN (all bits set, in every dtype), before anything is cached."""
        for buffer in self._buffers:
            buffer.view(np.uint8).fill(0xFF)
        self.fixed.poison()

    def accept(self, window: Window) -> None:
        """The step that bound `window` succeeded; rows lie in place, the rest is swapped."""
        self.fixed.accept()

    def reset(self) -> None:
        self._stride_tokens = 0
        self.fixed.reset()

    def cached_rows(self, layer: int, row: int, length: int) -> NDArray[np.float32]:
        """fp32, see `Runner.cached_rows`."""
        arrays = [
            self._rows(buffer, tensor) if held is None else held
            for buffer, tensor, held in zip(
                self._buffers, self.spec.tensors, self.fixed.held, strict=True
            )
        ]
        return _cached(self.spec, arrays, (layer, row), length)

    def _rows(self, buffer: Array, tensor: CacheTensor) -> Array:
        if tensor.is_fixed:
            return buffer
        used = self.batch * self._stride_tokens * tensor.width
        return buffer[:used].reshape(self.batch, 1, self._stride_tokens, tensor.width)

    def _bound(self, tokens: int) -> int:
        """Slots that one row alone binds for so many tokens."""
        return min(tokens if self.spec.store is None else self._wider(tokens), self.capacity)

    def _wider(self, tokens: int) -> int:
        """Slots of a row for so many tokens, in blocks."""
        large = _LARGE_BLOCK
        if self.spec.store is not None:
            large = BLOCKS[tokens > _WIDEST_FROM]
        block = _SMALL_BLOCK if tokens < _LARGE_FROM else large
        return -(-tokens // block) * block

    def _restride(self, stride_tokens: int, lengths_B: NDArray[np.int64]) -> None:
        """Move each row from the old stride to a wider one the last row first, else the first.

        Row b moves from b*old to b*new, so it can only land on rows already moved.
        """
        old = self._stride_tokens
        order = range(1, self.batch) if stride_tokens < old else range(self.batch - 1, 0, -1)
        for buffer, tensor in zip(self._buffers, self.spec.tensors, strict=True):
            if tensor.is_fixed:
                continue
            for row in order:
                count = int(lengths_B[row]) * tensor.width
                source, target = row * old * tensor.width, row * stride_tokens * tensor.width
                buffer[target : target + count] = buffer[source : source + count]
        self._stride_tokens = stride_tokens


class WholeCache(InPlaceCache):
    """For graphs of fixed capacity: every step binds all of the buffer.

    Such a graph does not clear stale slots: they are finite, as on a device that began with zeros.
    """

    has_row_windows = False

    def window(
        self, lengths_B: NDArray[np.int64], new_B: NDArray[np.int64], new_tokens: int
    ) -> Window:
        """The buffers, each row at its capacity."""
        self._stride_tokens = self.capacity
        views = [
            self._rows(buffer, tensor)
            for buffer, tensor in zip(self._buffers, self.spec.tensors, strict=True)
        ]
        return _window(views, views, self.fixed)

    def poison(self) -> None:
        """Fill every slot with numbers that do not belong there, before anything is cached."""
        for buffer in self._buffers:
            buffer.view(np.uint8).fill(_FINITE_BYTE)


class GrowingCache:
    """The graph returns past plus new as fresh tensors; the last ones are the cache."""

    has_row_windows = False

    def __init__(self, spec: CacheSpec, batch: int, capacity: int) -> None:
        self.spec, self.batch, self.capacity = spec, batch, capacity
        self._arrays = self._empty(0)
        self._past = 0
        self.fixed = FixedTensors(spec, batch)

    @property
    def bytes(self) -> int:
        """Bytes of the tensors held now: they grow with the longest row."""
        return sum(array.nbytes for array in self._arrays) + self.fixed.bytes

    def window(
        self, lengths_B: NDArray[np.int64], new_B: NDArray[np.int64], new_tokens: int
    ) -> Window:
        """The past as it stands, and fresh tensors with `new_tokens` slots more."""
        past = int(lengths_B.max())
        if self._past > past:
            # Rows of unequal length left slots behind the longest row.
            self._arrays = [np.ascontiguousarray(a[:, :, :past]) for a in self._arrays]
        self._past = past + new_tokens
        return _window(self._arrays, self._empty(self._past), self.fixed)

    def poison(self) -> None:
        """The graph itself makes every slot that is not written; rings are poisoned."""
        self.fixed.poison()

    def accept(self, window: Window) -> None:
        """The step succeeded: its outputs are the cache now."""
        self._arrays = [
            array if tensor.is_fixed else output
            for array, output, tensor in zip(
                self._arrays, window.outputs, self.spec.tensors, strict=True
            )
        ]
        self.fixed.accept()

    def reset(self) -> None:
        self._arrays = self._empty(0)
        self._past = 0
        self.fixed.reset()

    def cached_rows(self, layer: int, row: int, length: int) -> NDArray[np.float32]:
        """fp32, see `Runner.cached_rows`."""
        arrays = [
            array if held is None else held
            for array, held in zip(self._arrays, self.fixed.held, strict=True)
        ]
        return _cached(self.spec, arrays, (layer, row), length)

    def _empty(self, tokens: int) -> list[Array]:
        return [
            np.empty((self.batch, 1, 0 if t.is_fixed else tokens, t.width), t.numpy_type)
            for t in self.spec.tensors
        ]


LatentCache = InPlaceCache | GrowingCache


def open_cache(spec: CacheSpec, batch: int, capacity: int, *, whole: bool = False) -> LatentCache:
    """The cache of the kind that the bundle's graphs take."""
    if whole:
        return WholeCache(spec, batch, capacity)
    return (GrowingCache if spec.grows else InPlaceCache)(spec, batch, capacity)


def _window(
    inputs: list[Array], outputs: list[Array], fixed: FixedTensors, rows: slice = slice(None)
) -> Window:
    """Arrays of growing tensors, and those of rings and states where there are, of these rows."""
    return Window(
        tuple(a if f is None else f[rows] for a, f in zip(inputs, fixed.held, strict=True)),
        tuple(a if f is None else f[rows] for a, f in zip(outputs, fixed.fresh, strict=True)),
    )


def _cached(
    spec: CacheSpec, arrays: list[Array], place: tuple[int, int], length: int
) -> NDArray[np.float32]:
    """Rows of one layer and batch row side by side, oldest first; of a state, its values."""
    layer, row = place
    parts, codes = [], None
    for tensor, array in zip(spec.tensors, arrays, strict=True):
        if tensor.layer != layer:
            continue
        if tensor.dtype == "uint8":
            codes = array[row, 0, :length]
            continue
        values = as_float32(array[row], tensor.dtype)
        if tensor.scales is not None:
            values = values * tensor.scales
        if tensor.is_state:
            parts.append(values.reshape(1, -1))
        elif codes is not None and (store := spec.store_of(tensor)) is not None:
            parts.append(decode(codes, values[0, :length], store))
            codes = None
        elif tensor.rows is None:
            parts.append(values[0, :length])
        else:
            kept = np.arange(max(0, length - tensor.rows + 1), length)
            parts.append(values[0, kept % tensor.rows])
    return np.concatenate(parts, axis=-1)


def _reserved(spec: CacheSpec, batch: int, capacity: int) -> list[Array]:
    wanted = spec.bytes(batch, capacity)
    try:
        return [
            np.zeros(0 if t.is_fixed else batch * capacity * t.width, t.numpy_type)
            for t in spec.tensors
        ]
    except MemoryError:
        raise EnvironmentFailure(
            "RUN-MEMORY",
            f"no memory for a cache of {wanted} bytes ({batch} rows of {capacity} tokens)",
            hint="open the runner with a smaller capacity or batch, or export with --dtype fp16",
            cache_bytes=wanted,
        ) from None
