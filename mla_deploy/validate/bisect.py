"""The first place in a bundle's graph that leaves the gate, against a right graph of the model.

Both run the same calls with more outputs. The values that layers hand on are searched by halves,
then those of the first bad layer, node by node. Between two halves nothing is assumed to stay bad:
a half is good only when every value in it is, so the first bad value is the first there is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_deploy.errors import GateError
from mla_deploy.runtime.sessions import Graph, GraphSessions
from mla_deploy.validate.bisected import Bisected
from mla_deploy.validate.cases import Case, Form
from mla_deploy.validate.difference import relative_l2
from mla_deploy.validate.gates import Gate
from mla_deploy.validate.parity import GRAPHS
from mla_deploy.validate.probe_points import Point, difference_of
from mla_deploy.validate.probe_run import ProbedSessions, Replay, written_out

Floats = NDArray[np.float32]
_HUGE = 1e30  # masked scores; in a norm they would hide everything else


@dataclass(frozen=True)
class _Bad:
    """`found` is None where it is not finite."""

    point: Point
    measure: str
    found: float | None


class _Search:
    """One case at one call of one graph; `runs` counts how often the graphs were run."""

    def __init__(self, case: Case, sides: tuple[GraphSessions, GraphSessions], gate: Gate) -> None:
        """`case` has a form, so that every step takes one graph. `sides`: the bundle's, the right
        one's."""
        self.case, self.gate = case, gate
        self.graph: Graph = GRAPHS[case.form] or "decode"
        self.runs = 0
        self.call: int | None = None
        self.overflows = False  # the right graph is not finite either
        self._sides = sides
        self.found, self.right = (written_out(side, self.graph) for side in sides)
        self.places = self.found.aligned(self.right)

    def find_call(self) -> bool:
        """Whether some call's outputs differ; the first that does is `call`."""
        outputs = [
            point
            for point in self.found.points
            if point in self.places
            and self.found.node(point).outputs[point.key[2]].is_graph_output()
            and "logits" in point.output
        ]
        replays, probed = self._replays(outputs)
        for index in range(len(self.case.calls)):
            for replay in replays:
                replay.run(index)
            rows = zip(*(replay.cached() for replay in replays), strict=True)
            ends = [(side.held(i) for side in probed) for i in range(len(outputs))]
            pairs = [*rows, *(tuple(pair) for pair in ends)]
            whole = [(f, r) for f, r in pairs if f is not None and r is not None]
            if any(not np.isfinite(right).all() for _, right in whole):
                self.overflows, self.call = True, index
                return True
            if any(_distance(f, r, self.gate.rel_l2) is not None for f, r in whole):
                self.call = index
                return True
        return False

    def first_bad(self, points: Sequence[Point]) -> _Bad | None:
        """By halves, in the order of the graph."""
        low = 0
        while low < len(points):
            middle = (low + len(points) + 1) // 2
            for bad in self._bad_of(points[low:middle]):
                return bad
            low = middle
        return None

    def _bad_of(self, points: Sequence[Point]) -> list[_Bad]:
        """Those of `points` that leave the gate at `call`, in order."""
        replays, probed = self._replays(points)
        for index in range((self.call or 0) + 1):
            for replay in replays:
                replay.run(index)
        bad = []
        for index, point in enumerate(points):
            found, right = (side.held(index) for side in probed)
            if found is None or right is None:
                continue
            told = _overflow(found) if self.overflows else _distance(found, right, self.gate.rel_l2)
            if told is not None:
                bad.append(_Bad(point, *told))
        return bad

    def _replays(self, points: Sequence[Point]) -> tuple[list[Replay], list[ProbedSessions]]:
        self.runs += 1
        probed = [
            ProbedSessions(self._sides[0], self.graph, points, self.found),
            ProbedSessions(
                self._sides[1], self.graph, [self.places[p] for p in points], self.right
            ),
        ]
        poisoned = not self.overflows
        return [Replay(self.case, side, poisoned=poisoned) for side in probed], probed


def bisect(case: Case, bundle: GraphSessions, right: GraphSessions, gate: Gate) -> Bisected | None:
    """Search `case` in the bundle's graph. None when both graphs give the same for every call.

    The case is run in one graph at a time, and a prompt at once if the fault shows that way too.
    """
    runs = 0
    for tried in _forms(case):
        search = _Search(tried, (bundle, right), gate)
        try:
            if search.find_call():
                found = _located(search, runs)
                if found is not None:
                    return found
        except GateError:  # a step that cannot be run in this form
            pass
        runs += search.runs
    return None


def _located(search: _Search, runs: int) -> Bisected | None:
    shared = [point for point in search.found.points if point in search.places]
    handed = [point for point in shared if point.is_boundary]
    bad = search.first_bad(handed)
    if bad is None:
        return None
    place = shared.index(bad.point)
    inside = [p for p in shared[: place + 1] if p.layer == bad.point.layer]
    bad = search.first_bad(inside) or bad
    reason = difference_of(search.found, search.right, bad.point, search.places[bad.point])
    if search.overflows:
        reason = "the first value that is not finite, in the graph exported again as well: the " \
            "dtype does not hold it; export with --dtype bf16 or fp32"  # fmt: skip
    return Bisected(
        case=search.case.name,
        graph=search.graph,
        layer=bad.point.layer,
        node=bad.point.key[1],
        op_type=bad.point.op_type,
        output=bad.point.output,
        measure=bad.measure,
        found=bad.found,
        wanted=0.0 if bad.measure != _RELATIVE else search.gate.rel_l2,
        reason=reason,
        steps=runs + search.runs,
    )


_RELATIVE = "relative L2"
_NOT_FINITE = "values that are not finite"
_UNEQUAL = "share of values that differ"


def _forms(case: Case) -> list[Case]:
    """`case` in one graph at a time, prompts whole first."""
    forms: list[Form] = ["absorbed", "expanded"] if case.form == "auto" else [case.form]
    chunks = dict.fromkeys((max(case.longest, case.chunk), case.chunk))
    return [replace(case, form=form, chunk=chunk) for chunk in chunks for form in forms]


def _distance(found: Floats, right: Floats, bound: float) -> tuple[str, float | None] | None:
    """What leaves the gate, and by how much; None when nothing does.

    Where the right graph is not finite a slot was never written, and nothing is asked of it.
    """
    if found.shape != right.shape:
        return _UNEQUAL, 1.0
    asked = np.isfinite(right)
    mine, theirs = found[asked], right[asked]
    if not np.isfinite(mine).all():
        return _NOT_FINITE, None
    masked = np.abs(theirs) > _HUGE
    if ((np.abs(mine) > _HUGE) != masked).any():
        return _UNEQUAL, float(((np.abs(mine) > _HUGE) != masked).mean())
    error = relative_l2(theirs[~masked], mine[~masked])
    if not error <= bound:
        return _RELATIVE, error if math.isfinite(error) else 1.0
    return None


def _overflow(found: Any) -> tuple[str, float | None] | None:
    """A masked score may be minus infinity by design; NaN and plus infinity may not."""
    return (_NOT_FINITE, None) if np.isnan(found).any() or np.isposinf(found).any() else None
