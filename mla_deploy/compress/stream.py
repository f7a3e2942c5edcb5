"""Layer by layer through the source, and beside it through its compressed form.

Hidden states of every token are what is kept between layers; no two layers are in memory at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mla_deploy.compress.fold import HeadWeights
from mla_deploy.compress.key_basis import Doubles, KeyMoments
from mla_deploy.errors import InputError
from mla_deploy.source.cache import CacheRounding


@dataclass(frozen=True)
class LayerMoments:
    """Means over calibration tokens: of [key | value] (2 g d values), of its square, of queries."""

    mean_Z: Doubles
    moments_ZZ: Doubles
    queries_HF: Doubles
    tokens: int

    def keys(self, groups: int) -> KeyMoments:
        half = len(self.mean_Z) // 2
        return KeyMoments(self.moments_ZZ[:half, :half], self.queries_HF, groups)


class Rows:
    """Rows of tokens of one length, as hidden states that go from layer to layer."""

    def __init__(self, rows: Sequence[Sequence[int]], rotary: nn.Module, batch: int = 4) -> None:
        self.tokens_XS = torch.tensor(rows, dtype=torch.int64)
        self.batch = batch
        self.positions_1S = torch.arange(self.tokens_XS.shape[1])[None]
        with torch.no_grad():
            self.angles: Any = rotary(torch.zeros(1, 1, 1), self.positions_1S)
        self.hidden_XSD = torch.empty(0)

    def embed(self, embedding: nn.Module) -> None:
        with torch.no_grad():
            self.hidden_XSD = embedding(self.tokens_XS)

    def through(
        self, layer: nn.Module, watch: Any = None, cached: CacheRounding | None = None
    ) -> None:
        """Replace the hidden states by what `layer` makes of them; `watch` sees its inputs.

        `cached`: the layer is one of ours, and attends to rows as such a cache gives them back.
        """
        run: Any = layer
        options = cache_options(cached)
        with torch.no_grad():
            for start in range(0, len(self.hidden_XSD), self.batch):
                part = slice(start, start + self.batch)
                hidden = self.hidden_XSD[part]
                if watch is not None:
                    watch(run.input_layernorm(hidden))
                self.hidden_XSD[part] = run(
                    hidden, position_embeddings=self.angles, position_ids=self.positions_1S,
                    **options,
                )  # fmt: skip

    def copied(self, rows: int) -> Rows:
        """The first `rows` of these, from here on by themselves."""
        found = copy.copy(self)
        found.tokens_XS = self.tokens_XS[:rows]
        found.hidden_XSD = self.hidden_XSD[:rows].clone()
        return found

    def thinned(self, every: int) -> Rows:
        """One token in `every`, for what looks at tokens alone."""
        found = copy.copy(self)
        found.tokens_XS, found.hidden_XSD = self.tokens_XS[:, ::every], self.hidden_XSD[:, ::every]
        return found


class AttendedRows:
    """What attention took and gave at one layer, of rows that go through it in `with` this."""

    def __init__(self, layer: Any, rows: Rows, most: int | None = None) -> None:
        """`most`: of so many rows only."""
        self.angles: Any = rows.angles
        self.positions_1S = rows.positions_1S
        self._left = len(rows.tokens_XS) if most is None else most
        self._attention: Any = layer.self_attn
        self._hook: Any = None
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __enter__(self) -> AttendedRows:
        self._hook = self._attention.register_forward_hook(self._take, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def pairs(self) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
        """Inputs and outputs [B, S, D], a batch at a time."""
        return self._pairs

    def _take(self, _: Any, given: Any, options: Any, found: Any) -> None:
        inputs_BSD = options["hidden_states"] if "hidden_states" in options else given[0]
        if self._left > 0:
            self._pairs.append((inputs_BSD[: self._left], found[0][: self._left]))
            self._left -= len(inputs_BSD)


@contextmanager
def watched_inputs(module: Any, take: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Within, `take` sees what `module` is given."""
    hook = module.register_forward_pre_hook(lambda _, given: take(given[0]))
    try:
        yield
    finally:
        hook.remove()


def cache_options(cached: CacheRounding | None) -> dict[str, Any]:
    """Arguments of a layer of ours, or of its attention, whose rows are cached like that."""
    return {} if cached is None else {"cache": _Stored(cached)}


class _Stored:
    """Stands in for the cache of one layer that sees all its tokens at once."""

    def __init__(self, rounding: CacheRounding) -> None:
        self._rounding = rounding

    def update(
        self, latent: torch.Tensor, rope_key: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._rounding.latent(latent), self._rounding.rope_key(rope_key)


class MomentsOf:
    """Collects `LayerMoments` of one layer from the normed inputs of its attention."""

    def __init__(self, weights: HeadWeights, layer: int) -> None:
        self.weights, self.layer = weights, layer
        size = len(weights.key) + len(weights.value)
        self._sum_Z = np.zeros(size)
        self._moments_ZZ = np.zeros((size, size))
        self._queries_HF = np.zeros((weights.heads, weights.head_dim // 2))
        self._tokens = 0
        stacked = np.concatenate((weights.query, weights.key, weights.value)).astype(np.float32)
        bias = np.concatenate((weights.query_bias, weights.key_bias, weights.value_bias))
        self._weight, self._bias = torch.from_numpy(stacked), torch.from_numpy(bias).float()

    def __call__(self, normed_BSD: torch.Tensor) -> None:
        """Raises: InputError CMP-NONFINITE."""
        flat = normed_BSD.reshape(-1, normed_BSD.shape[-1])
        found = nn.functional.linear(flat, self._weight, self._bias).double().numpy()
        if not np.isfinite(found).all():
            raise InputError(
                "CMP-NONFINITE",
                f"keys, values or queries of layer {self.layer} are not finite on the calibration "
                "text",
                hint="the checkpoint overflows in fp32; it cannot be calibrated",
                layer=self.layer,
            )
        query, rest_XZ = np.split(found, [len(self.weights.query)], axis=1)
        self._sum_Z += rest_XZ.sum(0)
        self._moments_ZZ += rest_XZ.T @ rest_XZ
        parts = query.reshape(len(flat), self.weights.heads, 2, -1)
        self._queries_HF += (parts**2).sum((0, 2))
        self._tokens += len(flat)

    def done(self) -> LayerMoments:
        """The means over what was seen."""
        count = max(self._tokens, 1)
        return LayerMoments(
            self._sum_Z / count, self._moments_ZZ / count, self._queries_HF / count, self._tokens
        )
