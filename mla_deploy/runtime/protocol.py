"""What every runner can do, whatever executes the model: prefill, decode, reset.

A runner owns a batch of rows, each with its own cached tokens; rows begin and end independently.
Guards come first and are all or nothing: a call that is refused has changed neither `lengths` nor
one byte of the cache.
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

    def prefill(self, rows: Sequence[Sequence[int] | None]) -> NDArray[np.float32]:
        """Append `rows[b]` to row b (lengths may differ); fp32 [batch, vocab].

        None leaves a row idle: it stays as it is, and its logits are zeros.
        Raises: InputError RUN-BATCH, RUN-EMPTY, RUN-TOKEN, RUN-OVERFLOW.
        """
        ...

    def decode(self, tokens: Sequence[int | None]) -> NDArray[np.float32]:
        """Append one token to each row, None to none; fp32 [batch, vocab]. Raises as `prefill`."""
        ...

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Forget these rows, by their index; None is all. Raises: InputError RUN-ROW."""
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


@runtime_checkable
class Verifier(Runner, Protocol):
    """A runner that checks several new tokens in one pass, and can take them back."""

    @property
    def most_verified(self) -> int:
        """New tokens a row that `verify` takes; 0 where the bundle does not have their logits."""
        ...

    def verify(self, rows: Sequence[Sequence[int] | None]) -> NDArray[np.float32]:
        """As `prefill`, of 1 to 8 tokens a row, with the logits of each: fp32 [batch, S, vocab].

        S is the longest row; zeros stand behind a shorter one.
        Raises: as `prefill`; InputError RUN-VERIFY.
        """
        ...

    def rollback(self, lengths: Sequence[int] | NDArray[np.int64]) -> None:
        """Take back tokens: row b keeps its first `lengths[b]`. Raises: InputError RUN-ROLLBACK."""
        ...
