"""transformers' cache as the source uses it: what a forward calls it, and one that rounds."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import DynamicCache, PreTrainedConfig

from mla_deploy.errors import InputError
from mla_deploy.latent_store import LatentStore, rows_dtype, store_of
from mla_deploy.source.latent_values import rounded

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def cache_keyword(module: nn.Module) -> str:
    """The argument of `module` that takes the cache: transformers renamed it in 5.24."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def source_cache(config: PreTrainedConfig, form: CacheRounding) -> DynamicCache:
    """An empty cache for a model of `config`, which rounds the rows that it is given."""
    if form == CacheRounding():
        return DynamicCache(config=config)
    return StoredCache(config, form)


@dataclass(frozen=True)
class CacheRounding:
    """What cached rows are rounded to: `dtype`, and what keeps every token to `store`.

    A store is of the latent; some have one for the rope key too.
    """

    dtype: str = "fp32"
    store: LatentStore | None = None
    scales: Mapping[int, torch.Tensor] | None = field(default=None, compare=False)

    @classmethod
    def of(
        cls, cache_dtype: str, dtype: str, scales: Mapping[int, NDArray[np.float32]] | None = None
    ) -> CacheRounding:
        """As a bundle of that cache and of weights in `dtype` does.

        `scales`: of static codes, those of each cache index, [L].
        """
        held = None if scales is None else {i: torch.from_numpy(s) for i, s in scales.items()}
        return cls(rows_dtype(cache_dtype, dtype), store_of(cache_dtype), held)

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        if self.dtype not in HALVES:
            return rows
        return rows.to(HALVES[self.dtype]).to(rows.dtype)

    def latent(self, rows: torch.Tensor, index: int | None = None) -> torch.Tensor:
        """Those of cache `index`, which static codes want to know."""
        if self.store is not None and self.store.is_static:
            return self._static(rows, index)
        return self.rows(rows) if self.store is None else _stored(rows, self.store)

    def rope_key(self, rows: torch.Tensor) -> torch.Tensor:
        if self.store is None or self.store.rope_key is None or rows.shape[-1] == 0:
            return self.rows(rows)
        return _stored(rows, self.store.rope_key)

    def _static(self, rows: torch.Tensor, index: int | None) -> torch.Tensor:
        if self.scales is None or index is None or self.store is None:
            raise InputError("EXP-CACHE", "latents in static codes, and their scales are not known")
        scale_L = self.scales[index].to(rows.dtype)
        codes = torch.round(rows / scale_L).clamp(-128, 127)
        return codes * scale_L


def _stored(rows: torch.Tensor, store: LatentStore) -> torch.Tensor:
    found = rounded(rows.float().contiguous().numpy(), store)
    return torch.from_numpy(found).to(rows.dtype)


def cached_parts(layer: Any) -> list[torch.Tensor]:
    """What one layer of transformers' cache holds of its one batch row, parts as [X, W].

    The classes cache the latent as `keys` and the rotated rope key as `values`; a sliding layer
    keeps window - 1 rows. States come as one row each.
    """
    parts = []
    if getattr(layer, "keys", None) is not None:
        parts = [layer.keys[0, 0], layer.values[0, 0]]
    if getattr(layer, "indexer_keys", None) is not None:
        parts.append(layer.indexer_keys[0])
    convolutions, recurrences = (
        [state[0] for state in getattr(layer, name, {}).values() if state is not None]
        for name in ("conv_states", "recurrent_states")
    )
    # We keep the columns of a convolution as rows, channels last.
    parts += [state.T.reshape(1, -1) for state in convolutions]
    parts += [state.reshape(1, -1) for state in recurrences]
    return parts


class StoredCache(DynamicCache):
    """transformers' cache with every row rounded when it is written."""

    def __init__(self, config: PreTrainedConfig, form: CacheRounding) -> None:
        super().__init__(config=config)
        self._form = form

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *rest: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        index = rest[0] if rest else options["layer_idx"]
        slides = getattr(self.layers[index], "is_sliding", False)
        if slides:
            rows = self._form.rows(key_states), self._form.rows(value_states)
        else:
            rows = self._form.latent(key_states, index), self._form.rope_key(value_states)
        return super().update(*rows, *rest, **options)

    def update_indexer(
        self, indexer_key_states: torch.Tensor, *rest: Any, **options: Any
    ) -> torch.Tensor:
        return super().update_indexer(self._form.rows(indexer_key_states), *rest, **options)
