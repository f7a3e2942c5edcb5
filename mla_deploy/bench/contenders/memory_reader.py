"""Reads memory and does nothing else: the bandwidth that no step can pass.

Of the ways tried (sums, maxima, a matrix times a vector, torch and numpy) the dot product of two
halves of a buffer read fastest; one slice per thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_deploy.bench.contenders.contender import CannotPrefill
from mla_deploy.machine import usable_cores

READ_BYTES = 1 << 30  # far more than any cache of a processor


class MemoryReader:
    """`step` reads so many bytes once. The worker's process has one BLAS thread (`line_up.py`)."""

    def __init__(self, *, threads: int | None, read_bytes: int = READ_BYTES) -> None:
        count = threads or usable_cores()
        size = read_bytes // 8 // count
        self.halves = [(np.ones(size, np.float32), np.ones(size, np.float32)) for _ in range(count)]
        self.pool = ThreadPoolExecutor(count)

    def facts(self) -> dict[str, Any]:
        return {"versions": {"numpy": np.__version__}, "read_bytes": self._bytes}

    @property
    def _bytes(self) -> int:
        return sum(a.nbytes + b.nbytes for a, b in self.halves)

    def fill(self, context: int) -> int:
        return 0

    def step(self) -> None:
        for _ in self.pool.map(lambda pair: np.dot(*pair), self.halves):
            pass

    def rewind(self) -> None:
        """Nothing was changed."""

    def prefill(self, tokens: int) -> None:
        raise CannotPrefill

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        return np.zeros(0, np.float32)
