"""The tokens that `run` prints: one pass for each, or fewer with `--speculate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mla_deploy.runtime import Gain, Runner


def greedy(
    runner: Runner, ids: Sequence[int], most: int, ends: Sequence[int], ahead: int | None
) -> tuple[Iterator[int], Gain | None]:
    """`ahead` tokens are checked ahead, 0 leaves their number to the library; None checks none.

    The second result is what that brings, counted while the tokens come. Raises: as the library's.
    """
    from mla_deploy.runtime import Gain, generate, speculate

    if ahead is None:
        return generate(runner, ids, most, ends), None
    gain = Gain()
    return speculate(runner, ids, most, ends, draft=ahead or None, gain=gain), gain
