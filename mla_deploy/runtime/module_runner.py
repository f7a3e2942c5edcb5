"""A user's own module as a runner: it is asked about whole rows, and caches nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mla_deploy.export.weights import DTYPES, stored_dtype
from mla_deploy.runtime.guarded import GuardedRunner
from mla_deploy.runtime.guards import Rows, checked_places, checked_sizes
from mla_deploy.source.storage import Rounded, round_weights
from mla_deploy.source.user.module_source import ModuleSource
from mla_deploy.source.user.raised import Attend, whole_logits


class ModuleRunner(GuardedRunner):
    """`Runner` over the module itself in fp32: each call runs it on all tokens of a row."""

    def __init__(self, source: ModuleSource, batch: int = 1) -> None:
        """Raises: InputError RUN-BATCH."""
        capacity = source.config.max_position_embeddings
        checked_sizes(batch, capacity, 1)
        super().__init__(batch, capacity, source.config.vocab_size)
        self._source = source
        self._cache_dtype, self._is_source = "fp32", True
        self._rows: list[list[int]] = [[] for _ in range(batch)]

    @property
    def cache_bytes(self) -> int:
        """None: the module keeps nothing."""
        return 0

    def reset(self, rows: Sequence[int] | None = None) -> None:
        for row in checked_places(rows, self._batch):
            self._rows[row] = []
            self._lengths_B[row] = 0

    def store_as(
        self,
        dtype: str,
        *,
        cache_dtype: str | None = None,
        weights: bool = True,
        quantized: Rounded | None = None,
        scales: Mapping[int, NDArray[np.float32]] | None = None,
    ) -> None:
        """Reset, and from now on round weights and cached rows as a bundle of these does.

        No bundle of a module is quantised.

        Then the raised model stands in for the module, which has no cached rows to round.
        """
        self._cache_dtype = cache_dtype or dtype
        self._is_source = dtype == self._cache_dtype == "fp32"
        if dtype != "fp32" and weights:
            round_weights(self._source.raised.source.module, lambda s: stored_dtype(s, 0, dtype))
            for latent in self._source.raised.latents:
                latent.w_kv_b.copy_(latent.w_kv_b.to(DTYPES[dtype]).float())
        self.reset()

    def every_logit(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits after each of `tokens`, one prefix after the other: fp32 [tokens, vocab]."""
        self.reset()
        return np.stack([self.prefill([[token]])[0] for token in tokens])

    @property
    def cache_layers(self) -> tuple[int, ...]:
        return tuple(range(len(self._source.raised.latents)))

    @torch.inference_mode()
    def cached_rows(self, layer: int, row: int) -> NDArray[np.float32]:
        """The latent and the rope key of all tokens of a row: fp32 [tokens, L + R]."""
        _, cached = self._raised(self._rows[row])
        return cached[layer][0].float().numpy()

    @torch.inference_mode()
    def _appended(self, rows: Rows) -> NDArray[np.float32]:
        last_BV = np.zeros((self._batch, self.vocab_size), np.float32)
        for index, tokens in enumerate(rows):
            if not len(tokens):
                continue
            self._rows[index].extend(int(token) for token in tokens)
            self._lengths_B[index] += len(tokens)
            if self._is_source:
                ids_1T = torch.tensor([self._rows[index]])
                logits = whole_logits(self._source.raised.source, ids_1T)
            else:
                logits, _ = self._raised(self._rows[index])
            last_BV[index] = logits[0, -1].float().numpy()
        return last_BV

    def _raised(self, tokens: list[int]) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Logits of the raised model and the rows that it caches, rounded to the dtype."""
        raised = self._source.raised
        cached: dict[int, torch.Tensor] = {}
        eager, dtype = raised.eager(cached), DTYPES[self._cache_dtype]

        def rounded(
            index: int, query: torch.Tensor, latent: torch.Tensor, rope_key: torch.Tensor
        ) -> torch.Tensor:
            return eager(index, query, latent.to(dtype).float(), rope_key.to(dtype).float())

        attend: Attend = rounded
        positions_1T = torch.arange(len(tokens))[None]
        return raised.logits(torch.tensor([tokens]), positions_1T, attend), cached
