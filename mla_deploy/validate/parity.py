"""One case at a time: the bundle's runner against the source, call by call, gated."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mla_deploy.errors import GateError
from mla_deploy.runtime import OnnxRunner
from mla_deploy.runtime.sessions import Graph, GraphSessions
from mla_deploy.validate.cases import Call, Case, Form, Tokens
from mla_deploy.validate.difference import (
    LogitDifference,
    logit_difference,
    mean_kl,
    relative_l2,
    row_errors,
)
from mla_deploy.validate.gates import Gate
from mla_deploy.validate.reference import RowTrace

Floats = NDArray[np.float32]
_MANY_ROWS = 16  # fewer cached rows have no middle to speak of
GRAPHS: dict[Form, Graph | None] = {"auto": None, "absorbed": "decode", "expanded": "prefill"}


@dataclass(frozen=True)
class LayerDifference:
    """Relative error of the cached rows: the worst layer, and the first that is beyond the gate.

    The cache of layer i is made from the output of layer i - 1, so a fault in the attention or
    the experts of a layer shows first in the cache of the next one.
    """

    worst_layer: int
    worst_rel_l2: float
    first_bad_layer: int | None
    # Of each row by itself the median, in the layer where that is largest; None of few rows.
    worst_row_median: float | None = None


@dataclass(frozen=True)
class CaseResult:
    """One case. `failures` says which gate was not met and by what; empty means passed."""

    name: str
    batch: int
    tokens: int
    seconds: float
    failures: tuple[str, ...]
    logits: LogitDifference | None  # None when the bundle could not run the case
    rounding: LogitDifference | None  # from the fp32 source; None when it is the reference
    max_abs_bound: float | None
    cache: LayerDifference | None
    # Mean KL that the source itself has from its fp32 form once it is rounded alike; where rounded.
    source_mean_kl: float | None = None

    @property
    def passed(self) -> bool:
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """A distance is None where the case could not be run."""
        told = {each.name: getattr(self, each.name) for each in fields(self)}
        for name in ("logits", "rounding"):
            told[name] = None if told[name] is None else told[name].to_dict()
        told["cache"] = None if self.cache is None else asdict(self.cache)
        return {**told, "passed": self.passed}


@dataclass(frozen=True)
class Ran:
    """What a bundle gave for a case: logits [batch, calls, vocab] and cached rows by layer and row;
    `refusal` instead where it could not run it."""

    logits_BXV: Floats | None
    cached: Mapping[int, Sequence[Floats]]
    refusal: str | None
    seconds: float


class Rows(Protocol):
    """A side that is asked row by row."""

    def row(self, segments: tuple[Tokens, ...]) -> RowTrace: ...


def run_case(
    case: Case,
    sessions: GraphSessions,
    reference: Rows,
    gate: Gate,
    original: Rows | None = None,
) -> CaseResult:
    """Run `case` on a fresh runner and compare every logit returned and every row cached.

    `original` is the fp32 source where `reference` is that source rounded.
    """
    return judge_case(case, ran_case(case, sessions), reference, gate, original)


def ran_case(case: Case, sessions: GraphSessions) -> Ran:
    """Run `case` on a fresh runner.

    Every cache slot holds NaN before it is written, so a graph that reads a stale one fails.
    """
    started = time.perf_counter()
    try:
        runner = OnnxRunner(
            sessions,
            batch=case.batch,
            capacity=case.longest + (_widest(case) if sessions.writes_padding else 0),
            chunk=case.chunk,
            check_finite=True,
            graph=GRAPHS[case.form],
        )
        runner.poison()
        logits = [each for calls in _together(case) for each in _logits(runner, calls)]
    except GateError as refusal:
        return Ran(None, {}, f"{refusal.code}: {refusal.message}", _since(started))
    cached = {
        layer: [runner.cached_rows(layer, row) for row in range(case.batch)]
        for layer in runner.cache_layers
    }
    return Ran(np.stack(logits, axis=1), cached, None, _since(started))


def judge_case(
    case: Case,
    ran: Ran,
    reference: Rows,
    gate: Gate,
    original: Rows | None = None,
    *,
    noise: float | None = None,
) -> CaseResult:
    """Hold what was run against `reference`, by `gate`; see `run_case`.

    `noise`: the relative L2 that near ties go by, where it is not the gate's.
    """
    noise = gate.rel_l2 if noise is None else noise
    started = time.perf_counter() - ran.seconds
    if ran.logits_BXV is None:
        return _result(case, started, (ran.refusal or "it was not run",))
    traces = [reference.row(segments) for segments in case.rows()]
    wanted_XV = np.concatenate([trace.logits for trace in traces])
    found_XV = ran.logits_BXV.reshape(-1, ran.logits_BXV.shape[-1])
    difference = logit_difference(wanted_XV, found_XV, noise)
    layers = _layer_difference(ran.cached, traces, gate.cache_rel_l2)
    bound = gate.max_abs_bound(difference.largest_logit)
    failures = _failures(difference, layers, gate, bound)
    found = replace(
        _result(case, started, failures), logits=difference, max_abs_bound=bound, cache=layers
    )
    if original is None:
        return found
    unrounded_XV = np.concatenate([original.row(segments).logits for segments in case.rows()])
    return replace(
        found,
        rounding=logit_difference(unrounded_XV, found_XV, noise),
        source_mean_kl=mean_kl(unrounded_XV, wanted_XV),
    )


def _widest(case: Case) -> int:
    """Slots that padding may take behind a row."""
    return min(case.chunk, max(len(row) for call in case.calls for row in call.rows))


def _together(case: Case) -> Iterator[list[Call]]:
    """Calls that are made as one: decode calls, as many as the case says."""
    for is_decode, calls in groupby(case.calls, lambda call: call.is_decode):
        given = list(calls)
        count = case.checked if is_decode else 1
        yield from (given[start : start + count] for start in range(0, len(given), count))


def _logits(runner: OnnxRunner, calls: list[Call]) -> Sequence[Floats]:
    """What each of the calls gives."""
    if len(calls) > 1:
        columns = zip(*(call.rows for call in calls), strict=True)
        return _verified(runner, [[row[0] for row in column] for column in columns])
    (call,) = calls
    if call.is_decode:
        return [runner.decode([row[0] for row in call.rows])]
    return [runner.prefill(call.rows)]


def _verified(runner: OnnxRunner, rows: list[list[int]]) -> list[Floats]:
    """Half of the tokens with wrong ones behind, which are taken back; then the other half."""
    half, before_B = len(rows[0]) // 2, runner.lengths
    tried = runner.verify([[*row[:half], *row[:half:-1], row[0]] for row in rows])
    runner.rollback(before_B + half)
    rest = runner.verify([row[half:] for row in rows])
    return [*tried[:, :half].swapaxes(0, 1), *rest.swapaxes(0, 1)]


def _layer_difference(
    cached: Mapping[int, Sequence[Floats]], traces: list[RowTrace], bound: float
) -> LayerDifference:
    """Cache by cache; a cache that only one side has is off without bound."""
    layers = sorted({*cached, *traces[0].cached})
    errors, medians = [], []
    for layer in layers:
        pairs = _cached_pairs(traces, cached, layer)
        errors.append(max((relative_l2(*pair) for pair in pairs), default=math.inf))
        if errors[-1] < math.inf and sum(len(wanted) for wanted, _ in pairs) >= _MANY_ROWS:
            medians.append(float(np.median(np.concatenate([row_errors(*p) for p in pairs]))))
    worst = int(np.argmax(errors))
    bad = [layer for layer, error in zip(layers, errors, strict=True) if not error <= bound]
    return LayerDifference(
        layers[worst], errors[worst], bad[0] if bad else None, max(medians, default=None)
    )


def _cached_pairs(
    traces: list[RowTrace], cached: Mapping[int, Sequence[Floats]], layer: int
) -> list[tuple[Floats, Floats]]:
    """(wanted, found) rows of each row of the batch; none where the two sides differ in shape."""
    if layer not in cached or any(layer not in trace.cached for trace in traces):
        return []
    pairs = [(trace.cached[layer], cached[layer][row]) for row, trace in enumerate(traces)]
    alike = all(wanted.shape == found.shape for wanted, found in pairs)
    return pairs if alike else []


def _failures(
    logits: LogitDifference, layers: LayerDifference, gate: Gate, bound: float | None
) -> tuple[str, ...]:
    # `not a <= b` and not `a > b`: NaN must fail.
    found = [
        f"{name} is {value:.3g}, wanted at most {limit:.3g}"
        for name, value, limit in (
            ("max |logit difference|", logits.max_abs, bound),
            ("relative L2 of the logits", logits.rel_l2, gate.rel_l2),
            ("mean KL", logits.mean_kl, gate.mean_kl),
        )
        if limit is not None and not value <= limit
    ]
    if not layers.worst_rel_l2 <= gate.cache_rel_l2:
        found.append(
            f"cached rows of layer {layers.worst_layer} are off by {layers.worst_rel_l2:.3g}, "
            f"wanted at most {gate.cache_rel_l2:.3g}; layer {layers.first_bad_layer} is the first"
        )
    elif not _holds(layers.worst_row_median, gate.cache_row_median):
        found.append(
            f"cached rows are off by {layers.worst_row_median:.3g} in the middle, wanted at most "
            f"{gate.cache_row_median:.3g}"
        )
    elif found:
        found.append(
            f"every cached row agrees (worst layer {layers.worst_layer}, "
            f"{layers.worst_rel_l2:.3g}): the fault is after the cache of the last layer"
        )
    return tuple(found)


def _holds(value: float | None, limit: float | None) -> bool:
    return value is None or limit is None or value <= limit


def _result(
    case: Case,
    started: float,
    failures: tuple[str, ...],
) -> CaseResult:
    tokens = sum(len(row) for call in case.calls for row in call.rows)
    return CaseResult(
        name=case.name,
        batch=case.batch,
        tokens=tokens,
        seconds=_since(started),
        failures=failures,
        logits=None,
        rounding=None,
        max_abs_bound=None,
        cache=None,
    )


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 4)
