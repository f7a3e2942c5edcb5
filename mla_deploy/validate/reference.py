"""What the PyTorch source says, row by row; each row is computed once, whoever asks for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from mla_deploy.checkpoint import Checkpoint
from mla_deploy.config import MlaConfig
from mla_deploy.errors import GateError, IncompatibleError
from mla_deploy.validate.cases import Case, Tokens

if TYPE_CHECKING:
    from mla_deploy.source.storage import Rounded
    from mla_deploy.source.user.module_source import ModuleSource

Floats = NDArray[np.float32]
# A step of a small model is over before threads have met: beside other work two threads took 0.6 to
# 1.8 s a token of SmolLM2-135M, one 0.07 s. A large one is read faster by all threads.
_SHORT_TOKENS, _SMALL = 8, 1 << 30
_ROTATED_ALIKE = 1e-4  # ten times what a bundle may differ: sums in another order, twice


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
        scales: Mapping[int, Floats] | None = None,
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

    def __init__(
        self, source: SourceRunner, *, logits_of: Reference | None = None, short_tokens: int = 0
    ) -> None:
        """`source` has one row. `logits_of`, the same model, gives the logits in its place, and
        the source's own may not be far from them. Calls of at most `short_tokens` run on one
        thread."""
        self._source = source
        self._short_tokens = short_tokens
        self._logits_of = logits_of
        self._traces: dict[tuple[Tokens, ...], RowTrace] = {}

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> Reference:
        """Builds transformers' class with the checkpoint's weights. Raises: CKPT-*, SRC-*."""
        from mla_deploy.runtime.torch_runner import TorchRunner

        elements = sum(prod(info.shape) for info in checkpoint.tensors.values())
        short_tokens = _SHORT_TOKENS if elements <= _SMALL else 0
        return cls(TorchRunner(checkpoint), short_tokens=short_tokens)

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
        scales: Mapping[int, Floats] | None = None,
    ) -> Reference:
        """The source as a bundle of `dtype` stores it, its weights too if asked; self for fp32.

        `cache_dtype` where the cache is stored otherwise; `quantized` rounds what the bundle
        quantises, `scales` are those of static codes by cache index.

        There is memory for one model, so the rows of `cases` are run first; afterwards this
        reference answers for those only.
        """
        if dtype == (cache_dtype or dtype) == "fp32" and quantized is None:
            return self
        for case in cases:
            for segments in case.rows():
                self.row(segments)
        self._source.store_as(
            dtype, cache_dtype=cache_dtype, weights=weights, quantized=quantized, scales=scales
        )
        return Reference(self._source, short_tokens=self._short_tokens)

    def rotated(self, cases: Sequence[Case]) -> Reference:
        """The source with rotated latents: cached rows as those of such a bundle, logits as before.

        As with `stored_as`, this reference then answers for `cases` only.
        Raises: IncompatibleError VAL-ROTATION for a source that is no checkpoint; InputError
        EXP-ROTATE.
        """
        from mla_deploy.runtime.torch_runner import TorchRunner

        if not isinstance(self._source, TorchRunner):
            raise IncompatibleError(
                "VAL-ROTATION",
                "the bundle caches rotated latents, and the source is no checkpoint, whose latents "
                "could be rotated alike",
                hint="name the checkpoint that the bundle was exported from",
            )
        for case in cases:
            for segments in case.rows():
                self.row(segments)
        self._source.rotate_latents()
        return Reference(self._source, logits_of=self, short_tokens=self._short_tokens)

    def every_logit(self, tokens: Tokens) -> Floats:
        """Logits after each token of a row of its own."""
        return self._source.every_logit(tokens)

    def row(self, segments: tuple[Tokens, ...]) -> RowTrace:
        """The trace of a row whose calls append `segments`, one after the other."""
        if segments not in self._traces:
            self._source.reset()
            logits = [self._last_logits(segment) for segment in segments]
            cached = {i: self._source.cached_rows(i, 0) for i in self._source.cache_layers}
            self._traces[segments] = RowTrace(self._judged(segments, np.stack(logits)), cached)
        return self._traces[segments]

    def _last_logits(self, segment: Tokens) -> Floats:
        if len(segment) > self._short_tokens:
            return self._source.prefill([segment])[0]
        from mla_deploy.weight_forms.one_thread import one_thread

        with one_thread():
            return self._source.prefill([segment])[0]

    def _judged(self, segments: tuple[Tokens, ...], logits: Floats) -> Floats:
        """Those of the source as it came: a rotation that changed them would hide in both sides."""
        if self._logits_of is None:
            return logits
        wanted = self._logits_of.row(segments).logits
        # Of the call in the middle: where two keys or experts tie to the last bit, one may be
        # chosen here and the other there, and that token then goes another way.
        norms = np.maximum(np.linalg.norm(wanted, axis=-1), 1e-30)
        distance = float(np.median(np.linalg.norm(logits - wanted, axis=-1) / norms))
        if not distance <= _ROTATED_ALIKE:
            raise GateError(
                "VAL-ROTATION",
                f"rotating the source's latents moves its logits by {distance:.2g} of their norm; "
                f"wanted at most {_ROTATED_ALIKE:g}",
                hint="this model uses its latent in a way that no rotation leaves alone: export "
                "without --rotate-latent, and please report it",
            )
        return wanted


Progress = Callable[[str, int, int], None]
