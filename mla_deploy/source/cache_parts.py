"""What a layer keeps between calls, part by part, and the buffers that the parts are laid out in.

A *row* part has one row for each cached token (latent, rope key, indexer key): in a ring of
`window` rows where the layer slides, else in as many rows as the cache has capacity. A *state* part
(convolution, recurrent) has one shape, however many tokens came by.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from mla_deploy.latent_store import LatentStore

ROWS = ("latent", "rope_key", "indexer_key")
STATES = ("conv_state", "recurrent_state")
# The buffer of the scales of a buffer of codes.
SCALES = {"latent_cache": "latent_scale", "rope_key_cache": "rope_key_scale"}


@dataclass(frozen=True)
class CachePart:
    """What transformers' cache layer `index` keeps; `shape` is without batch and rows."""

    index: int
    kind: str  # one of ROWS or STATES
    shape: tuple[int, ...]
    window: int | None = None

    @property
    def is_state(self) -> bool:
        return self.kind in STATES


@dataclass(frozen=True)
class CacheBuffer:
    """One cache tensor of a graph: `parts` side by side along the last axis.

    Of rows stored in fewer bits, `stored` is the dtype of their codes or scales, and `width` how
    many a row has.
    """

    index: int
    kind: str  # latent_cache, rope_key_cache, the SCALES of both, indexer_key_cache, ..._state
    parts: tuple[CachePart, ...]
    stored: str | None = None  # uint8, int8, fp32, fp16; None: as the cache is
    width: int | None = None

    @property
    def is_state(self) -> bool:
        return self.parts[0].is_state

    @property
    def window(self) -> int | None:
        return self.parts[0].window

    @property
    def shape(self) -> tuple[int, ...]:
        """(W,) of a row, or the whole state without the batch."""
        if self.is_state:
            return self.parts[0].shape
        if self.width is not None:
            return (self.width,)
        return (sum(part.shape[0] for part in self.parts),)

    @property
    def elements(self) -> int:
        """Values of one row, or of the state."""
        return prod(self.shape)

    def name(self, *, out: bool = False) -> str:
        """The graph's name of the buffer as input, or as output."""
        return f"{self.kind}_out.{self.index}" if out else f"{self.kind}.{self.index}"


def buffers_of(
    parts: Sequence[CachePart], *, fused: bool, store: LatentStore | None = None
) -> tuple[CacheBuffer, ...]:
    """The buffers of `parts`, in their order; a latent and its rope key share one when `fused`.

    With a `store`, a latent that keeps every token is two buffers, codes and scales; so is its rope
    key, where the store has one for it. Static scales are no buffer.
    """
    buffers: list[CacheBuffer] = []
    for part in parts:
        if part.is_state:
            buffers.append(CacheBuffer(part.index, part.kind, (part,)))
        elif part.shape[0] == 0:
            continue  # a layer without rope has no rope key
        elif store and part.window is None and (rows := store.of_kind(part.kind)) is not None:
            buffers.extend(_stored(part, rows))
        elif part.kind == "rope_key" and fused and store is None:
            latent = buffers.pop()
            buffers.append(CacheBuffer(part.index, latent.kind, (*latent.parts, part)))
        else:
            buffers.append(CacheBuffer(part.index, f"{part.kind}_cache", (part,)))
    return tuple(buffers)


def _stored(part: CachePart, store: LatentStore) -> Iterator[CacheBuffer]:
    values, codes = part.shape[0], f"{part.kind}_cache"
    if store.is_static:
        yield CacheBuffer(part.index, codes, (part,), "int8", values)
        return
    yield CacheBuffer(part.index, codes, (part,), "uint8", store.columns(values))
    yield CacheBuffer(part.index, SCALES[codes], (part,), store.scale_dtype, store.tiles(values))
