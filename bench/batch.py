"""Tokens a second by rows: one step of 1 to 16 rows together, of one row after the other, and of
several new tokens of one row.

The stack m4 (4 layers, hidden 2048, 16 heads, rank 512), random weights, fp32; every row of a batch
holds the same number of tokens. All batches take turns in one run.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import stack
from table import Goal, Report, bench_arguments, show

from mla_deploy.bench.contenders.rows import layer_rows
from mla_deploy.bench.interleave import Timing, interleave
from mla_deploy.bench.provenance import provenance
from mla_deploy.bench.sizes import token_counts
from mla_deploy.bundle import Bundle
from mla_deploy.export import export
from mla_deploy.runtime import OnnxRunner
from mla_deploy.runtime.sessions import GraphSessions

_ROOM = 64  # tokens of a row behind its context: the window is wider than the row, as when serving


def main() -> None:
    parser = bench_arguments(__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=token_counts, default=(512, 2048))
    parser.add_argument("--batch", type=token_counts, default=(1, 2, 4, 8, 16))
    parser.add_argument("--checked", type=token_counts, default=(1, 2, 4, 8))
    options = parser.parse_args()
    report = Report("batch", {})
    with ExitStack() as cleanup:
        work = Path(tempfile.mkdtemp(prefix="bench-batch-", dir=options.work))
        cleanup.callback(shutil.rmtree, work, ignore_errors=True)
        checkpoint = stack.write_checkpoint(work / "checkpoint", stack.m4(options.layers))
        bundle = export(checkpoint, work / "bundle", capacity=max(options.context) + _ROOM)
        shutil.rmtree(checkpoint)
        report.provenance = provenance(
            options.threads, dtype="fp32", layers=options.layers, contexts=options.context,
            batches=options.batch, realtime=options.realtime,
        )  # fmt: skip
        for context in options.context:
            _measure(bundle, context, options, report)
    show(report, options.json)


def _measure(bundle: Bundle, context: int, options: Any, report: Report) -> None:
    sessions = GraphSessions(bundle, options.threads)
    runners = {batch: _filled(sessions, batch, context) for batch in options.batch}
    calls: dict[str, Callable[[], object]] = {}
    for batch, runner in runners.items():
        calls[f"step {batch}"] = lambda r=runner: _decode(r, context)
        calls[f"together {batch}"] = lambda r=runner: _together(r, context)
        calls[f"apart {batch}"] = lambda r=runner: _apart(r, context)
    one = runners[min(runners)]
    for count in options.checked:
        calls[f"checked {count}"] = lambda n=count: _checked(one, context, n)
    found = interleave(calls, options.rounds, realtime=options.realtime)
    first = min(options.batch)
    alone = first / found[f"step {first}"].median
    rates = []
    for batch in options.batch:
        timing = found[f"step {batch}"]
        rates.append(batch / timing.median)
        report.rows.append({
            "table": "one step of every row", "context": context, "rows": batch,
            **timing.to_dict(), "tokens_per_s": rates[-1], "against_one_row": rates[-1] / alone,
            "together_ms": 1000 * found[f"together {batch}"].median,
            "apart_ms": 1000 * found[f"apart {batch}"].median,
        })  # fmt: skip
    single = found[f"checked {min(options.checked)}"].median
    for count in options.checked:
        report.rows.append(_checked_row(context, count, found[f"checked {count}"], single))
    least = min(b / a for a, b in itertools.pairwise(rates))
    what = f"tokens/s at {context}: each batch / the next smaller, least"
    report.goals.append(Goal(what, least, 1.0))


def _checked_row(context: int, count: int, timing: Timing, single: float) -> dict[str, Any]:
    return {
        "table": "new tokens of one row in one pass", "context": context, "new_tokens": count,
        **timing.to_dict(), "passes_of_one": timing.median / single,
    }  # fmt: skip


def _filled(sessions: GraphSessions, batch: int, context: int) -> OnnxRunner:
    """A runner whose rows hold `context` tokens; what they hold changes no time."""
    runner = OnnxRunner(sessions, batch=batch, capacity=context + _ROOM)
    runner._cache.window(np.zeros(batch, np.int64), np.full(batch, context + _ROOM), 1)
    for buffer, tensor in zip(runner._cache._buffers, runner._spec.tensors, strict=True):  # type: ignore[union-attr]
        buffer[:] = layer_rows(tensor.layer, len(buffer) // tensor.width, tensor.width).ravel()
    return runner


def _decode(runner: OnnxRunner, context: int) -> None:
    """As the runner chooses."""
    runner._lengths_B[:] = context - 1
    runner.decode([5] * runner.batch)


def _together(runner: OnnxRunner, context: int) -> None:
    runner._lengths_B[:] = context - 1
    runner.step(np.full((runner.batch, 1), 5), np.ones(runner.batch, np.int64), "decode")


def _apart(runner: OnnxRunner, context: int) -> None:
    """As many steps of one row each."""
    for row in range(runner.batch):
        runner._lengths_B[:] = context - 1
        runner.decode([5 if index == row else None for index in range(runner.batch)])


def _checked(runner: OnnxRunner, context: int, count: int) -> None:
    runner._lengths_B[:] = context - count
    runner.verify([[5] * count, *[None] * (runner.batch - 1)])


if __name__ == "__main__":
    main()
