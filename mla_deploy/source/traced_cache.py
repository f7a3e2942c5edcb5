"""Stands in for transformers' cache while a layer is traced: each call becomes a composite.

update             ->  CacheUpdate(cache_B1MW, rows_B1SW, plan...)     every token is kept
                   ->  RingUpdate(ring_B1WX, rows_B1SX, ring...)       the last `window` are
                   ->  QuantizedUpdate(codes, scales, rows_B1SL, plan...) kept in fewer bits
                   ->  StaticUpdate(codes_B1ML, rows_B1SL, plan...)    so, scales of the graph's own
update_indexer     ->  the same, for the indexer's keys
update_conv_state, then the convolution
                   ->  ConvState(mixed_BSC, state_BPC, weight_C1K, new_lengths_B)
rows that another layer stored
                   ->  CacheRead(cache_B1TW, filled, all_visible), QuantizedRead likewise
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.onnx import ops as onnx_ops

from mla_deploy.errors import InputError
from mla_deploy.latent_store import LatentStore
from mla_deploy.source.cache_parts import SCALES, CacheBuffer
from mla_deploy.source.plan import RingPlan, StepPlan

DOMAIN = "mla_deploy"
Buffers = Sequence[tuple[CacheBuffer, torch.Tensor]]
Shared = Mapping[str, tuple[CacheBuffer, torch.Tensor]]  # by kind


class TracedCache:
    """The caches of one layer. `buffers` are its own, `shared` those it reads of other layers."""

    def __init__(
        self,
        plan: StepPlan,
        ring: RingPlan | None,
        buffers: Buffers,
        shared: Buffers = (),
        *,
        store: LatentStore | None = None,
    ) -> None:
        self._store = store
        self.plan, self.ring = plan, ring
        self._held = dict(buffers)
        self._shared = dict(shared)
        self._updated: dict[CacheBuffer, torch.Tensor] = {}
        self._convolved: CacheBuffer | None = None

    @property
    def updated(self) -> tuple[torch.Tensor, ...]:
        """The buffers after the call, in order. Raises: SRC-CACHE when one was not updated."""
        missing = [b.name() for b in self._held if b not in self._updated]
        if missing:
            raise InputError("SRC-CACHE", f"the layer left {', '.join(missing)} as it was")
        return tuple(self._updated[buffer] for buffer in self._held)

    def update(
        self, latent_B1SL: torch.Tensor, rope_key_B1SR: torch.Tensor, index: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """transformers' contract: takes the new rows, returns all rows."""
        latent = self._buffer(index, "latent_cache")
        rank = latent_B1SL.shape[-1]
        if latent.stored is None and latent.shape[0] != rank:
            rows = self._append(latent, torch.cat((latent_B1SL, rope_key_B1SR), dim=-1))
            return rows[..., :rank], rows[..., rank:]
        rows = self._append(latent, latent_B1SL)
        if rope_key_B1SR.shape[-1] == 0:
            return rows, rows[..., :0]
        return rows, self._append(self._buffer(index, "rope_key_cache"), rope_key_B1SR)

    def update_indexer(
        self, keys_BSK: torch.Tensor, index: int, *, cleared: bool = False
    ) -> torch.Tensor:
        """Stale rows come back as they lie unless `cleared`: their scores are masked."""
        buffer = self._buffer(index, "indexer_key_cache")
        return self._append(buffer, keys_BSK[:, None], cleared=cleared)[:, 0]

    def get_conv_state(self, index: int, state_idx: int = 0) -> torch.Tensor:
        return self._held[self._buffer(index, "conv_state")]

    def get_recurrent_state(self, index: int, state_idx: int = 0) -> torch.Tensor:
        return self._held[self._buffer(index, "recurrent_state")]

    def update_conv_state(
        self, mixed_BCS: torch.Tensor, index: int, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        """The new columns as they are: the kept ones come in with the convolution."""
        self._convolved = self._buffer(index, "conv_state")
        return mixed_BCS

    def convolve(
        self,
        mixed_BCS: torch.Tensor,
        weight_CK: torch.Tensor,
        bias_C: torch.Tensor | None,
        activation: str | None,
    ) -> torch.Tensor:
        """Composite: the causal convolution behind the kept columns, and the columns kept now."""
        buffer = self._convolved
        if buffer is None or activation not in ("silu", None):
            raise InputError("SRC-SEAM", f"a convolution with activation {activation} is not known")
        self._convolved = None
        held_BPC = self._held[buffer]
        operands = [mixed_BCS.transpose(1, 2), held_BPC, weight_CK[:, None]]
        operands += [self.plan.new_lengths_B, *(() if bias_C is None else (bias_C,))]
        out_BSC, state_BPC = onnx_ops.symbolic_multi_out(
            f"{DOMAIN}::ConvState",
            operands,
            {"channels": held_BPC.shape[-1], "activation": activation or "none"},
            dtypes=(torch.float32, torch.float32),
            shapes=(operands[0].shape, held_BPC.shape),
            version=1,
        )
        self._put(buffer, state_BPC)
        return out_BSC.transpose(1, 2)

    def update_recurrent_state(
        self, state: torch.Tensor, index: int, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        self._put(self._buffer(index, "recurrent_state"), state)
        return state

    def shared_rows(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Latent and rope key rows that the layer of cache `index` stored in this call."""
        found = {b.kind: (b, t) for b, t in self._shared.items() if b.index == index}
        rows = self._read(found, "latent_cache")
        if "rope_key_cache" in found:
            return rows, self._read(found, "rope_key_cache")
        rank = found["latent_cache"][0].parts[0].shape[0]
        return rows[..., :rank], rows[..., rank:]

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def _buffer(self, index: int, kind: str) -> CacheBuffer:
        for buffer in self._held:
            if (buffer.index, buffer.kind) == (index, kind):
                return buffer
        raise InputError("SRC-CACHE", f"the layer has no {kind} of cache {index} when it is traced")

    def _append(
        self, buffer: CacheBuffer, rows_B1SW: torch.Tensor, *, cleared: bool = True
    ) -> torch.Tensor:
        held = self._held[buffer]
        if buffer.stored is not None and self._store is not None and self._store.is_static:
            cache, rows = static_update(held, rows_B1SW, self.plan)
        elif buffer.stored is not None:
            scales = self._buffer(buffer.index, SCALES[buffer.kind])
            both = (held, self._held[scales])
            cache, kept, rows = quantized_update(both, rows_B1SW, self.plan, self._store_of(buffer))
            self._put(scales, kept)
        elif buffer.window is None:
            cache, rows = cache_update(held, rows_B1SW, self.plan, cleared=cleared)
        elif self.ring is None:
            raise InputError("SRC-CACHE", f"{buffer.name()} slides, but no ring was planned")
        else:
            cache, rows = ring_update(held, rows_B1SW, self.ring)
        self._put(buffer, cache)
        return rows

    def _read(self, found: Shared, kind: str) -> torch.Tensor:
        buffer, cache = found[kind]
        if buffer.stored is None:
            return cache_read(cache, self.plan)
        held = (cache, found[SCALES[kind]][1])
        return quantized_read(held, self.plan, self._store_of(buffer), buffer.parts[0].shape[0])

    def _store_of(self, codes: CacheBuffer) -> str:
        """The name of the store of a latent's codes, or of a rope key's."""
        store = None if self._store is None else self._store.of_kind(codes.kind)
        if store is None:
            raise InputError("SRC-CACHE", f"{codes.name()} is codes, but no store was chosen")
        return store.name

    def _put(self, buffer: CacheBuffer, value: torch.Tensor) -> None:
        if buffer in self._updated:
            raise InputError("SRC-CACHE", f"the layer updates {buffer.name()} twice; wanted once")
        self._updated[buffer] = value


class SharedRows(dict[str, Any]):
    """Stands in for the dict through which layers share rows: reads come from the cache itself."""

    def __init__(self, cache: TracedCache, reads: Mapping[str, int]) -> None:
        super().__init__({key: cache.shared_rows(index) for key, index in reads.items()})


def cache_update(
    cache_B1MW: torch.Tensor, rows_B1SW: torch.Tensor, plan: StepPlan, *, cleared: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Composite: the updated cache, and its rows in fp32; unfilled slots are zero if `cleared`."""
    batch, width = rows_B1SW.shape[0], rows_B1SW.shape[-1]
    shape = (batch, 1, plan.filled_B1T1.shape[2], width)
    operands = (
        cache_B1MW,
        rows_B1SW,
        plan.filled_B1T1,
        plan.all_visible,
        plan.active_B11,
        plan.source_BS1,
        plan.slot_BS3,
    )
    cache, rows = onnx_ops.symbolic_multi_out(
        f"{DOMAIN}::CacheUpdate",
        operands,
        {"cleared": int(cleared)},
        dtypes=(cache_B1MW.dtype, rows_B1SW.dtype),
        shapes=(shape, shape),
        version=1,
    )
    return cache, rows


def ring_update(
    ring_B1WX: torch.Tensor, rows_B1SX: torch.Tensor, ring: RingPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Composite: the updated ring; its old rows and the new ones behind, unfilled ones zero."""
    batch, width = rows_B1SX.shape[0], rows_B1SX.shape[-1]
    operands = (
        ring_B1WX,
        rows_B1SX,
        ring.ring_filled_B1U1,
        ring.ring_source_BS1,
        ring.ring_slot_BS3,
    )
    cache, rows = onnx_ops.symbolic_multi_out(
        f"{DOMAIN}::RingUpdate",
        operands,
        dtypes=(ring_B1WX.dtype, rows_B1SX.dtype),
        shapes=(ring_B1WX.shape, (batch, 1, ring.ring_filled_B1U1.shape[2], width)),
        version=1,
    )
    return cache, rows


def cache_read(cache_B1TW: torch.Tensor, plan: StepPlan) -> torch.Tensor:
    """Composite: the rows of a cache that is up to date, in fp32, zeros in every unfilled slot."""
    return onnx_ops.symbolic(
        f"{DOMAIN}::CacheRead",
        (cache_B1TW, plan.filled_B1T1, plan.all_visible),
        dtype=torch.float32,
        shape=(*cache_B1TW.shape[:2], plan.filled_B1T1.shape[2], cache_B1TW.shape[3]),
        version=1,
    )


def quantized_update(
    held: tuple[torch.Tensor, torch.Tensor], rows_B1SL: torch.Tensor, plan: StepPlan, store: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Composite: codes and scales updated, and their rows in fp32, unfilled slots zero."""
    batch, total = rows_B1SL.shape[0], plan.filled_B1T1.shape[2]
    operands = (
        *held,
        rows_B1SL,
        plan.filled_B1T1,
        plan.all_visible,
        plan.active_B11,
        plan.source_BS1,
        plan.slot_BS3,
    )
    widths = (held[0].shape[-1], held[1].shape[-1], rows_B1SL.shape[-1])
    codes, scales, rows = onnx_ops.symbolic_multi_out(
        f"{DOMAIN}::QuantizedUpdate",
        operands,
        {"store": store},
        dtypes=(held[0].dtype, held[1].dtype, rows_B1SL.dtype),
        shapes=tuple((batch, 1, total, width) for width in widths),
        version=1,
    )
    return codes, scales, rows


def static_update(
    codes_B1ML: torch.Tensor, rows_B1SL: torch.Tensor, plan: StepPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Composite: codes updated, and their rows; stale slots as they lie: codes are finite."""
    batch, rank = rows_B1SL.shape[0], rows_B1SL.shape[-1]
    shape = (batch, 1, plan.filled_B1T1.shape[2], rank)
    operands = (codes_B1ML, rows_B1SL, plan.active_B11, plan.source_BS1, plan.slot_BS3)
    codes, rows = onnx_ops.symbolic_multi_out(
        f"{DOMAIN}::StaticUpdate",
        operands,
        dtypes=(codes_B1ML.dtype, rows_B1SL.dtype),
        shapes=(shape, shape),
        version=1,
    )
    return codes, rows


def quantized_read(
    held: tuple[torch.Tensor, torch.Tensor], plan: StepPlan, store: str, rank: int
) -> torch.Tensor:
    """Composite: the rows of codes and scales that are up to date, as `cache_read` gives them."""
    return onnx_ops.symbolic(
        f"{DOMAIN}::QuantizedRead",
        (*held, plan.filled_B1T1, plan.all_visible),
        {"store": store},
        dtype=torch.float32,
        shape=(*held[0].shape[:2], plan.filled_B1T1.shape[2], rank),
        version=1,
    )
