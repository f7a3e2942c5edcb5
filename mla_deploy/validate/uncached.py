"""A bundle against itself: the same tokens one by one through its cache, and in one prefill.

What a call reads from the cache must say what the same tokens say when nothing is cached: no source
is needed to see a cache that does not hold what was put in.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mla_deploy.bundle import Bundle
from mla_deploy.errors import GateError
from mla_deploy.runtime import OnnxRunner
from mla_deploy.runtime.sessions import GraphSessions
from mla_deploy.validate.gates import Gate

_SEED = 20260303
_LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, 48, 64)


@dataclass(frozen=True)
class Uncached:
    """`max_abs`: the largest |logit difference| over `positions`; infinite where it could not be
    run."""

    positions: int
    max_abs: float
    wanted: float

    @property
    def passed(self) -> bool:
        return self.positions > 0 and self.max_abs <= self.wanted

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def cached_against_uncached(bundle: Bundle, sessions: GraphSessions, gate: Gate) -> Uncached:
    """The logits after so many tokens of a random row: decoded one by one, and prefilled at once.

    One by one takes the absorbed graph, at once the expanded one, so both forms are held against
    each other as well. Where the gate has no absolute bound its relative one is taken of the
    largest logit.
    """
    try:
        worst, largest, positions = _distances(bundle, sessions)
    except GateError:  # a case says more
        return Uncached(0, math.inf, 0.0)
    bound = gate.max_abs_bound(largest)
    return Uncached(positions, worst, gate.rel_l2 * largest if bound is None else bound)


def _distances(bundle: Bundle, sessions: GraphSessions) -> tuple[float, float, int]:
    """The largest distance, the largest logit, and how many positions were compared."""
    model = bundle.manifest["model"]
    most = min(_LENGTHS[-1], int(model["max_position_embeddings"]))
    lengths = [length for length in _LENGTHS if length <= most]
    ids = np.random.default_rng(_SEED).integers(0, int(model["vocab_size"]), most)
    tokens = [int(token) for token in ids]
    capacity = most + (most if sessions.writes_padding else 0)
    cached = OnnxRunner(sessions, capacity=capacity, graph="decode")
    cached.poison()
    stepped = [cached.prefill([[token]])[0] for token in tokens]
    runner = OnnxRunner(sessions, capacity=capacity, graph="prefill")
    worst, largest = 0.0, 0.0
    for length in lengths:
        runner.poison()
        whole_V = runner.prefill([tokens[:length]])[0].astype(np.float64)
        found = float(np.abs(stepped[length - 1] - whole_V).max())
        worst = max(worst, found if math.isfinite(found) else math.inf)
        largest = max(largest, float(np.abs(whole_V).max()))
    return worst, largest, len(lengths)
