"""transformers' cache as the source uses it: what a forward calls it, and one that rounds."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def cache_keyword(module: nn.Module) -> str:
    """The argument of `module` that takes the cache: transformers renamed it in 5.24."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def source_cache(config: PreTrainedConfig, dtype: str) -> DynamicCache:
    """An empty cache for a model of `config`; rows are rounded to `dtype` unless it is fp32."""
    return StoredCache(config, dtype) if dtype in HALVES else DynamicCache(config=config)


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
    """transformers' cache with every row rounded to `dtype` when it is written."""

    def __init__(self, config: PreTrainedConfig, dtype: str) -> None:
        super().__init__(config=config)
        self._dtype = HALVES[dtype]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *rest: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rounded = (rows.to(self._dtype).to(rows.dtype) for rows in (key_states, value_states))
        return super().update(*rounded, *rest, **options)

    def update_indexer(
        self, indexer_key_states: torch.Tensor, *rest: Any, **options: Any
    ) -> torch.Tensor:
        rounded = indexer_key_states.to(self._dtype).to(indexer_key_states.dtype)
        return super().update_indexer(rounded, *rest, **options)
