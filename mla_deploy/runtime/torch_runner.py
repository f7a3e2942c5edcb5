"""The PyTorch source as a runner: the reference that everything else is held against.

Each row has a cache of its own and runs alone, so a ragged batch needs no padding here and no
row can touch another. Slow on purpose: it is transformers' own code path, call by call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from mla_deploy.checkpoint import Checkpoint
from mla_deploy.export.weights import stored_dtype
from mla_deploy.runtime.guarded import GuardedRunner
from mla_deploy.runtime.guards import Rows, checked_places, checked_sizes
from mla_deploy.source import module_from_checkpoint
from mla_deploy.source.cache import CacheRounding, cache_keyword, cached_parts, source_cache
from mla_deploy.source.latent_rotation import rotate_module
from mla_deploy.source.storage import Rounded, round_weights, transform_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TorchRunner(GuardedRunner):
    """`Runner` over transformers' class in fp32."""

    def __init__(
        self, checkpoint: Checkpoint, batch: int = 1, *, module: PreTrainedModel | None = None
    ) -> None:
        """`module` is the checkpoint's model when the caller has built it already.

        Raises: CKPT-*, SRC-*, CFG-HF (as `module_from_checkpoint`), InputError RUN-BATCH.
        """
        config = checkpoint.config
        checked_sizes(batch, config.max_position_embeddings, 1)
        super().__init__(batch, config.max_position_embeddings, config.vocab_size)
        self._module = module_from_checkpoint(checkpoint) if module is None else module
        self._cache_keyword = cache_keyword(self._module)
        self._router_rows = config.router_rows
        self._rounding = CacheRounding()
        self._caches: list[Any] = [None] * batch
        self.reset()

    @property
    def cache_bytes(self) -> int:
        return sum(
            tensor.nbytes
            for cache in self._caches
            for layer in cache.layers
            for tensor in cached_parts(layer)
        )

    def reset(self, rows: Sequence[int] | None = None) -> None:
        for row in checked_places(rows, self._batch):
            self._lengths_B[row] = 0
            self._caches[row] = source_cache(self._module.config, self._rounding)

    def store_as(
        self,
        dtype: str,
        *,
        cache_dtype: str | None = None,
        weights: bool = True,
        quantized: Rounded | None = None,
        scales: Mapping[int, NDArray[np.float32]] | None = None,
    ) -> None:
        """Reset, and from now on round weights and cached rows as a bundle does.

        `cache_dtype` None: the cache is of `dtype` too. `quantized` rounds what such a bundle
        quantises, before the rest is rounded to `dtype`; `scales` are those of static codes.
        The weights are rounded in place: there is no way back; a bundle beside its checkpoint
        keeps them as they are (`weights` false).
        """
        done: frozenset[str] = frozenset()
        if quantized is not None:
            done = transform_weights(self._module, quantized)
        self._rounding = CacheRounding.of(cache_dtype or dtype, dtype, scales)
        if dtype != "fp32" and weights:
            router_rows = self._router_rows
            round_weights(self._module, lambda s: stored_dtype(s, router_rows, dtype), done)
        self.reset()

    def rotate_latents(self) -> None:
        """Reset, and from now on cache latents as such a bundle does; there is no way back.

        Raises: InputError EXP-ROTATE.
        """
        rotate_module(self._module)
        self.reset()

    @property
    def cache_layers(self) -> tuple[int, ...]:
        return tuple(i for i, layer in enumerate(self._caches[0].layers) if cached_parts(layer))

    def cached_rows(self, layer: int, row: int) -> NDArray[np.float32]:
        parts = cached_parts(self._caches[row].layers[layer])
        return torch.cat(parts, dim=-1).float().numpy()

    @torch.inference_mode()
    def every_logit(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits after each of `tokens`, a row of its own, nothing kept: fp32 [tokens, vocab]."""
        ids = torch.tensor([list(tokens)])
        found = self._module(input_ids=ids, use_cache=False).logits[0]
        return np.asarray(found.float().numpy())

    @torch.inference_mode()
    def _appended(self, rows: Rows) -> NDArray[np.float32]:
        last_BV = np.zeros((self._batch, self._vocab_size), np.float32)
        for index, tokens in enumerate(rows):
            if not len(tokens):
                continue
            out = self._module(
                input_ids=torch.from_numpy(tokens)[None],
                use_cache=True,
                logits_to_keep=1,
                **{self._cache_keyword: self._caches[index]},
            )
            self._lengths_B[index] += len(tokens)
            last_BV[index] = out.logits[0, -1].float().numpy()
        return last_BV
