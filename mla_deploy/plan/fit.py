"""The most that fits: the longest context and the biggest batch."""

from __future__ import annotations

from collections.abc import Callable

MOST_ROWS = 1 << 16


def most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest count up to `limit` that fits, 0 when not even one does; `fits` is monotone."""
    if limit < 1 or not fits(1):
        return 0
    low, high = 1, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
