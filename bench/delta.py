"""Milliseconds of the linear-attention parts of one layer on ONNX Runtime's CPU provider.

32 heads, keys and values of 128, 4 taps over 12288 channels (Kimi-Linear-48B), fp32; one new token
of 1 and of 4 rows, and prefills of 32 and 512. The forms are those of `delta_forms.py`; each is
checked against ours before it is timed. State in and out are one buffer, except for `chunked`: its
last chunk may write the state before it has read all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import delta_forms as forms
import numpy as np
import onnx_ir as ir
from delta_chunked import chunked
from delta_forms import Linear
from table import Goal, Report, bench_arguments, show

from mla_deploy.bench.interleave import interleave
from mla_deploy.bench.provenance import provenance
from mla_deploy.bench.sessions import Arrays, bound_call, open_session, session_options

_OURS, _CHUNKED = "ours", "chunked"
_Forms = dict[str, Callable[[Linear], ir.Model]]
_TABLES: dict[str, tuple[str, _Forms]] = {
    "delta recurrence": ("state", {
        _OURS: lambda s: forms.delta(s, lowered=True),
        "plain body, Scan": lambda s: forms.delta(s, lowered=False),
        _CHUNKED: chunked,
    }),
    "convolution": ("rows", {
        _OURS: lambda s: forms.conv(s, lowered=True),
        "plain body, Conv": lambda s: forms.conv(s, lowered=False),
        "CausalConvWithState": forms.contrib_conv,
    }),
}  # fmt: skip


def main() -> None:
    parser = bench_arguments(__doc__)
    parser.add_argument("--shapes", default="1x1,4x1,1x32,1x512", help="rows x new tokens")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--wide", type=int, default=128)
    parser.add_argument("--taps", type=int, default=4)
    options = parser.parse_args()
    sizes = Linear(options.heads, options.width, options.wide, options.taps)
    report = Report("delta", provenance(
        options.threads, dtype="fp32", heads=sizes.heads, key=sizes.width, value=sizes.wide,
        taps=sizes.taps, realtime=options.realtime,
    ))  # fmt: skip
    for shape in options.shapes.split(","):
        batch, new = map(int, shape.split("x"))
        feeds = forms.feeds(sizes, batch, new)
        for table in _TABLES:
            report.rows += _rows(table, sizes, feeds, options)
            _goal(report, table, shape)
    show(report, options.json)


def _rows(table: str, sizes: Linear, feeds: Arrays, options: Any) -> list[dict[str, Any]]:
    state, builders = _TABLES[table]
    batch, new = feeds["valid"].shape
    calls, errors, wanted = {}, {}, None
    for name, build in builders.items():
        held = {**feeds, state: feeds[state].copy()}
        session = open_session(build(sizes), session_options(options.threads))
        run, fetch = bound_call(session, held, {} if name == _CHUNKED else {"state_out": state})
        run()
        found = fetch()
        wanted = found if wanted is None else wanted
        calls[name] = run
        errors[name] = max(float(np.abs(found[n] - wanted[n]).max()) for n in wanted)
    repeat = max(1, 64 // new)
    timings = interleave(calls, options.rounds, realtime=options.realtime, repeat=repeat)
    ours = timings[_OURS].median
    return [
        {"table": f"{table}, one layer", "rows": batch, "new": new, "form": name,
         **timing.to_dict(), "us_per_token": 1e6 * timing.median / (batch * new),
         "ratio": timing.median / ours, "max_error": errors[name]}
        for name, timing in timings.items()
    ]  # fmt: skip


def _goal(report: Report, table: str, shape: str) -> None:
    """The reason for the form we chose: no other is faster by more than 1.3."""
    rivals = [
        row["ratio"] for row in report.rows
        if row["table"].startswith(table) and f"{row['rows']}x{row['new']}" == shape
        and row["form"] != _OURS
    ]  # fmt: skip
    report.goals.append(Goal(f"{table} {shape}: fastest other form / ours", min(rivals), 1 / 1.3))


if __name__ == "__main__":
    main()
