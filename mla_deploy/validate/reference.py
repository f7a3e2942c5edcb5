"""What the PyTorch source says, row by row; each row is computed once, whoever asks for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from mla_deploy.checkpoint import Checkpoint
from mla_deploy.config import MlaConfig
from mla_deploy.validate.cases import Case, Tokens

if TYPE_CHECKING:
    from mla_deploy.source.storage import Rounded
    from mla_deploy.source.user.module_source import ModuleSource

Floats = NDArray[np.float32]


class SourceRunner(Protocol):
    """A source as a runner of one row, which can round as a bundle's dtype does."""

    @property
    def cache_layers(self) -> tuple[int, ...]: ...
    def prefill(self, rows: Sequence[Sequence[int]]) -> Floats: ...
    def decode(self, tokens: Sequence[int]) -> Floats: ...
    def every_logit(self, tokens: Sequence[int]) -> Floats: ...
    def reset(self) -> None: ...
    def cached_rows(self, layer: int, row: int) -> Floats: ...
    def store_as(
        self,
        dtype: str,
        *,
        cache_dtype: str | None = None,
        weights: bool = True,
        quantized: Rounded | None = None,
    ) -> None: ...


class Source(Protocol):
    """What a bundle is held against: a checkpoint, or a user's module."""

    @property
    def config(self) -> MlaConfig: ...
    @property
    def digest(self) -> str: ...
    @property
    def notes(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class RowTrace:
    """One row after its calls: logits after each call, and the cache it left, per layer."""

    logits: Floats  # [X, vocab]
    cached: Mapping[int, Floats]  # by cache layer, as `Runner.cached_rows`


class Reference:
    """The source, asked row by row with the same calls as the bundle gets.

    Rows run alone: a ragged batch of the bundle is held against rows that never saw each other.
    """

    def __init__(self, source: SourceRunner) -> None:
        """`source` has one row."""
        self._source = source
        self._traces: dict[tuple[Tokens, ...], RowTrace] = {}

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> Reference:
        """Builds transformers' class with the checkpoint's weights. Raises: CKPT-*, SRC-*."""
        from mla_deploy.runtime.torch_runner import TorchRunner

        return cls(TorchRunner(checkpoint))

    @classmethod
    def of_module(cls, source: ModuleSource) -> Reference:
        """A user's own module."""
        from mla_deploy.runtime.module_runner import ModuleRunner

        return cls(ModuleRunner(source))

    def stored_as(
        self,
        dtype: str,
        cases: Sequence[Case],
        *,
        cache_dtype: str | None = None,
        weights: bool = True,
        quantized: Rounded | None = None,
    ) -> Reference:
        """The source as a bundle of `dtype` stores it, its weights too if asked; self for fp32.

        `cache_dtype` where the cache is stored otherwise; `quantized` rounds what the bundle
        quantises.

        There is memory for one model, so the rows of `cases` are run first; afterwards this
        reference answers for those only.
        """
        if dtype == (cache_dtype or dtype) == "fp32" and quantized is None:
            return self
        for case in cases:
            for segments in case.rows():
                self.row(segments)
        self._source.store_as(dtype, cache_dtype=cache_dtype, weights=weights, quantized=quantized)
        return Reference(self._source)

    def every_logit(self, tokens: Tokens) -> Floats:
        """Logits after each token of a row of its own."""
        return self._source.every_logit(tokens)

    def row(self, segments: tuple[Tokens, ...]) -> RowTrace:
        """The trace of a row whose calls append `segments`, one after the other."""
        if segments not in self._traces:
            self._source.reset()
            logits = [self._source.prefill([segment])[0] for segment in segments]
            cached = {i: self._source.cached_rows(i, 0) for i in self._source.cache_layers}
            self._traces[segments] = RowTrace(np.stack(logits), cached)
        return self._traces[segments]


Progress = Callable[[str, int, int], None]
