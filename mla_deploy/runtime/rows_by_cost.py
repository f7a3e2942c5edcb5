"""Whether the rows of a call go through the graph together, or each by itself.

Together the weights are read once, but every row is padded to the longest, idle ones too, and the
window of several rows is masked and cleared. What that costs, in units of one more new token
(2.3 ms on the stack m4 in fp32 with 2 threads, `bench/batch.py`; only the ratios matter):

    a call of one new token        17    a read of the weights
    a call of n new tokens         28 + n    products of several rows cost another pass over weights
    a row of T tokens, together    T / 470
    a row of T tokens, alone       T / 2000
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mla_deploy.runtime.guards import Rows

_ONE, _SEVERAL = 17.0, 28.0
_TOGETHER_TOKENS, _ALONE_TOKENS = 470.0, 2000.0


def rows_by_cost(rows: Rows, lengths_B: NDArray[np.int64]) -> list[tuple[int | None, Rows]]:
    """All rows (None), or the index of each that has tokens, alone: whichever costs less."""
    counts_B = np.array([len(row) for row in rows], np.int64)
    after_B = lengths_B + counts_B
    together = _call(len(rows) * int(counts_B.max()))
    together += len(rows) * float(after_B.max()) / _TOGETHER_TOKENS
    active = np.flatnonzero(counts_B)
    alone = sum(_call(int(counts_B[row])) + after_B[row] / _ALONE_TOKENS for row in active)
    if together <= alone:
        return [(None, rows)]
    return [(int(row), (rows[row],)) for row in active]


def _call(tokens: int) -> float:
    return _ONE if tokens == 1 else _SEVERAL + tokens
