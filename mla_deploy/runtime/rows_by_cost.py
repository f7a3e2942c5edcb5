"""Whether the rows of a call go through the graph together, or each by itself.

Together the weights are read once, but every row is padded to the longest, idle ones too. What a
call of n tokens costs, in units of one more token (measured on the stack m4 in fp32, 2 threads):

    one token      32: a read of the weights
    n > 1          58 + n: products of several rows make a copy of the weights for the caches first
"""

from __future__ import annotations

from mla_deploy.runtime.guards import Rows

_ONE, _SEVERAL = 32, 58


def rows_by_cost(rows: Rows) -> list[tuple[int | None, Rows]]:
    """All rows (None), or the index of each that has tokens, alone: whichever costs less."""
    counts = [len(row) for row in rows if len(row)]
    if _cost(len(rows) * max(counts)) <= sum(map(_cost, counts)):
        return [(None, rows)]
    return [(index, (row,)) for index, row in enumerate(rows) if len(row)]


def _cost(tokens: int) -> int:
    return _ONE if tokens == 1 else _SEVERAL + tokens
