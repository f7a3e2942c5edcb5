"""What runners have in common: their sizes, and two ways in that are guarded alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mla_deploy.runtime.guards import Rows, Tokens, checked_rows, checked_step


class GuardedRunner(ABC):
    """A `Runner` but for what executes: `_appended` gets rows that have passed the guards."""

    def __init__(self, batch: int, capacity: int, vocab_size: int) -> None:
        self._batch, self._capacity, self._vocab_size = batch, capacity, vocab_size
        self._lengths_B = np.zeros(batch, np.int64)

    @property
    def batch(self) -> int:
        return self._batch

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def lengths(self) -> NDArray[np.int64]:
        return self._lengths_B.copy()

    def prefill(self, rows: Sequence[Tokens]) -> NDArray[np.float32]:
        return self._appended(self._checked(rows))

    def decode(self, tokens: Sequence[int | None]) -> NDArray[np.float32]:
        sizes = self._capacity, self._vocab_size
        return self._appended(checked_step(tokens, self._lengths_B, *sizes))

    def _checked(self, rows: Sequence[Tokens]) -> Rows:
        """Raises: as `prefill`."""
        return checked_rows(rows, self._lengths_B, self._capacity, self._vocab_size)

    @abstractmethod
    def _appended(self, rows: Rows) -> NDArray[np.float32]:
        """Appends `rows`; the logits of each row's last token, fp32 [batch, vocab]."""
