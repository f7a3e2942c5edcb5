"""transformers' own class, in fp32, with its own DynamicCache, which keeps the latent too."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from mla_deploy.bench.contenders.rows import TOKEN, layer_rows, prompt_ids
from mla_deploy.checkpoint import open_checkpoint
from mla_deploy.source import module_from_checkpoint
from mla_deploy.source.cache import cache_keyword, cached_parts


class SourceContender:
    """One implementation of attention, `sdpa` or `eager`."""

    def __init__(
        self, checkpoint: str, *, attention: str, layers: Sequence[int], random_rows: bool,
        threads: int | None,
    ) -> None:  # fmt: skip
        """`layers`: the caches that the model has. Raises: as `module_from_checkpoint`."""
        if threads is not None:
            torch.set_num_threads(threads)
        with open_checkpoint(Path(checkpoint)) as source:
            self.module = module_from_checkpoint(source)
        self.module.set_attn_implementation(attention)
        self.layers, self.random_rows = tuple(layers), random_rows
        self.cache: Any = None
        self.kept: Any = None

    def facts(self) -> dict[str, Any]:
        how = "random rows" if self.random_rows else "real tokens"
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        return {"versions": versions, "cache_filled_with": how, "cache_dtype": "fp32"}

    def fill(self, context: int) -> int:
        self._empty()
        if self.random_rows:
            self._fill_rows(context - 1)
        else:
            self._append(prompt_ids(context - 1, self.module.config.vocab_size))
        self.length = self.cache.get_seq_length()
        held = sum(part.nbytes for layer in self.cache.layers for part in cached_parts(layer))
        if self.random_rows:
            return held * context // self.length
        self.kept = copy.deepcopy(self.cache)
        return held

    def _fill_rows(self, tokens: int) -> None:
        rank, rope = self.module.config.kv_lora_rank, self.module.config.qk_rope_head_dim
        for layer in self.layers:
            row_11TW = torch.from_numpy(layer_rows(layer, tokens, rank + rope))[None, None]
            latent, rope_key = row_11TW[..., :rank], row_11TW[..., rank:]
            self.cache.update(latent.contiguous(), rope_key.contiguous(), layer)

    def step(self) -> None:
        self._append([TOKEN])

    def rewind(self) -> None:
        if self.random_rows:
            self.cache.crop(self.length - self.cache.get_seq_length())
        else:  # rings and states cannot be cropped
            self.cache = copy.deepcopy(self.kept)

    def prefill(self, tokens: int) -> None:
        self.logits(prompt_ids(tokens, self.module.config.vocab_size))

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        self._empty()
        return self._append(ids)

    def _empty(self) -> None:
        self.cache = transformers.DynamicCache(config=self.module.config)

    @torch.inference_mode()
    def _append(self, ids: Sequence[int]) -> NDArray[np.float32]:
        cached = {cache_keyword(self.module): self.cache}
        out = self.module(torch.tensor([list(ids)]), use_cache=True, logits_to_keep=1, **cached)
        return out.logits[0, -1].numpy()
