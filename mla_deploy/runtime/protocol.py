"""What every runner can do, whatever executes the model: prefill, decode, reset.

A runner owns a batch of rows, each with its own cached tokens. Guards come first and are all or
nothing: a call that is refused has changed neither `lengths` nor one byte of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@runtime_checkable
class Runner(Protocol):
    """One batch of sequences in progress. Logits are of each row's last token."""

    @property
    def batch(self) -> int: ...

    @property
    def capacity(self) -> int:
        """Tokens that each row can hold."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Valid tokens per row: int64 [batch], a copy."""
        ...

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache tensors, measured."""
        ...

    def prefill(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Append `rows[b]` to row b (lengths may differ); fp32 [batch, vocab].

        Raises: InputError RUN-BATCH, RUN-EMPTY, RUN-TOKEN, RUN-OVERFLOW.
        """
        ...

    def decode(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append one token to each row; fp32 [batch, vocab]. Raises as `prefill`."""
        ...

    def reset(self) -> None:
        """Forget every row."""
        ...

    @property
    def cache_layers(self) -> tuple[int, ...]:
        """Indices of the caches there are: of layers, or where a layer has two, of both."""
        ...

    def cached_rows(self, layer: int, row: int) -> NDArray[np.float32]:
        """What the cache of one layer holds of one row, oldest first: fp32 [tokens, W].

        W: latent, rotated rope key, indexer key, as far as there are. A sliding layer gives its
        last window - 1 rows. A layer that keeps states gives them as one row.
        """
        ...
