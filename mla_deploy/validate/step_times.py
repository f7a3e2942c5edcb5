"""How long a decode step takes as the context grows: short, on this machine, for the report.

Nothing here is judged; `mla-deploy bench` is the way to compare speeds.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

from mla_deploy.machine import processor_name, usable_cores
from mla_deploy.runtime import OnnxRunner
from mla_deploy.runtime.sessions import GraphSessions

_CONTEXTS = (1, 16, 64, 256, 512, 1024, 2048, 4096)
_ROUNDS = 7
_SECONDS = 30.0  # no further context is begun that would end later


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of one decode step after `context` tokens: median, least, most."""

    context: int
    median_ms: float
    min_ms: float
    max_ms: float


@dataclass(frozen=True)
class StepTimes:
    """`threads` None: as many as ONNX Runtime takes."""

    points: tuple[StepTime, ...]
    rounds: int
    threads: int | None
    cores: int
    processor: str
    runtime: str
    load_average: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        points = [asdict(point) for point in self.points]
        return {**asdict(self), "points": points, "load_average": list(self.load_average)}


def measure_steps(sessions: GraphSessions) -> StepTimes | None:
    """Medians at a few contexts within the capacity of `sessions`; None if it is a few tokens."""
    runner = OnnxRunner(sessions)
    points: list[StepTime] = []
    started, token_seconds = time.perf_counter(), 0.0
    for context in _CONTEXTS:
        missing = context - int(runner.lengths[0])
        if context + 1 + _ROUNDS > runner.capacity:
            break
        if points:
            steps = (1 + _ROUNDS) * points[-1].median_ms / 1000
            end = time.perf_counter() - started + missing * token_seconds + steps
            if end > _SECONDS:
                break
        before = time.perf_counter()
        _fill(runner, missing)
        token_seconds = (time.perf_counter() - before) / missing
        points.append(_timed(runner, context))
    if not points:
        return None
    return StepTimes(
        points=tuple(points),
        rounds=_ROUNDS,
        threads=sessions.threads,
        cores=usable_cores(),
        processor=processor_name(),
        runtime=sessions.runtime("decode"),
        load_average=tuple(round(load, 2) for load in os.getloadavg()),
    )


def _fill(runner: OnnxRunner, missing: int) -> None:
    runner.prefill([[_token(place, runner.vocab_size) for place in range(missing)]])


def _timed(runner: OnnxRunner, context: int) -> StepTime:
    """One step is not counted, then come the rounds."""
    runner.decode([0])
    seconds = []
    for place in range(_ROUNDS):
        before = time.perf_counter()
        runner.decode([_token(place, runner.vocab_size)])
        seconds.append(time.perf_counter() - before)
    spread = (statistics.median(seconds), min(seconds), max(seconds))
    return StepTime(context, *(round(1000 * value, 4) for value in spread))


def _token(place: int, vocab_size: int) -> int:
    return (7 * place + 1) % vocab_size
