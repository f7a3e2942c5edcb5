"""Timing by interleaved rounds: A B C, A B C, ... so that a noisy machine slows all of them alike.

Here are the clock of a call and the rounds of contenders that share a process; those of processes
are in `compare.py`. Only ratios of medians taken in one run are compared. `realtime` puts every
thread of the process under SCHED_RR around the timed call, where the system lets it: a busy machine
then does not preempt half of a two-threaded step. Where it does not, timing goes on as it is.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

REST_SECONDS = 0.02  # lets the spinning threads of the previous contender fall asleep


@dataclass(frozen=True)
class Timing:
    """Seconds of each round of one contender."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Milliseconds: median, the spread (least, most), and how many rounds."""
        ms = [1000 * s for s in (self.median, self.best, max(self.seconds))]
        names = ("median_ms", "min_ms", "max_ms")
        found: dict[str, Any] = {n: round(v, 4) for n, v in zip(names, ms, strict=True)}
        return {**found, "rounds": len(self.seconds)}


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    realtime: bool = False,
    repeat: int = 1,
) -> dict[str, Timing]:
    """Time each contender once per round, in turn, after one untimed call of each.

    With `repeat` a round's figure is the mean of that many calls in a row: for calls so short
    that the clock and the wake-up would be measured.
    """
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    for _ in range(rounds):
        for name, call in contenders.items():
            time.sleep(REST_SECONDS)
            with scheduled(realtime):
                start = time.perf_counter()
                for _ in range(repeat):
                    call()
                found[name].append((time.perf_counter() - start) / repeat)
    return {name: Timing(tuple(seconds)) for name, seconds in found.items()}


@contextlib.contextmanager
def scheduled(realtime: bool) -> Iterator[None]:
    """SCHED_RR for every thread of the process, where asked for and allowed."""
    if not realtime or not hasattr(os, "sched_setscheduler"):
        yield
        return
    _set_threads(os.SCHED_RR, 1)
    try:
        yield
    finally:
        _set_threads(os.SCHED_OTHER, 0)


def _set_threads(policy: int, priority: int) -> None:
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # not allowed, or the thread has ended
            os.sched_setscheduler(int(thread), policy, os.sched_param(priority))
