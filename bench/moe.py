"""Milliseconds of one layer of routed experts on ONNX Runtime's CPU provider, form by form.

64 experts, 6 per token, hidden 2048, inner 1408 (DeepSeek-V2-Lite), fp32; 1, 8 and 64 tokens. The
forms are those of `moe_forms.py`; each is checked against ours before it is timed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from moe_feeds import tokens_of, weights_of
from moe_forms import FORMS, Experts
from table import Goal, Report, bench_arguments, show

from mla_deploy.bench.interleave import interleave
from mla_deploy.bench.provenance import provenance
from mla_deploy.bench.sessions import bound_call, open_session, session_options
from mla_deploy.bench.sizes import token_counts

_OURS = "ours, If per expert"
_GATHER_LIMIT_BYTES = 2 << 30


def main() -> None:
    parser = bench_arguments(__doc__)
    parser.add_argument("--tokens", type=token_counts, default=(1, 8, 64))
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--chosen", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=1408)
    options = parser.parse_args()
    experts = Experts(options.experts, options.chosen, options.hidden, options.inner)
    report = Report("moe", provenance(
        options.threads, dtype="fp32", experts=experts.count, per_token=experts.chosen,
        hidden=experts.hidden, inner=experts.inner, realtime=options.realtime,
    ))  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="bench-moe-", dir=options.work) as folder:
        weights = weights_of(experts, Path(folder))
        for tokens in options.tokens:
            feeds = {**weights, **tokens_of(experts, tokens)}
            report.rows += _rows(experts, tokens, feeds, options)
            _goal(report, tokens)
    show(report, options.json)


def _rows(experts: Experts, tokens: int, feeds: Any, options: Any) -> list[dict[str, Any]]:
    calls, errors, skipped, wanted = {}, {}, [], None
    for name, build in FORMS.items():
        gathered_bytes = tokens * experts.chosen * experts.bytes_each
        if name == "gathered weights" and gathered_bytes > _GATHER_LIMIT_BYTES:
            skipped.append((name, f"would gather {gathered_bytes / 2**30:.1f} GiB"))
            continue
        session = open_session(build(experts), session_options(options.threads))
        run, fetch = bound_call(session, feeds, {})
        run()
        out = fetch()["out"]
        wanted = out if wanted is None else wanted
        calls[name], errors[name] = run, float(np.abs(out - wanted).max())
    found = interleave(calls, options.rounds, realtime=options.realtime)
    ours = found[_OURS].median
    common = {"table": "routed experts, one layer", "tokens": tokens}
    rows = [
        {**common, "form": name, **timing.to_dict(), "ratio": timing.median / ours,
         "max_error": errors[name]}
        for name, timing in found.items()
    ]  # fmt: skip
    return rows + [{**common, "form": name, "median_ms": reason} for name, reason in skipped]


def _goal(report: Report, tokens: int) -> None:
    """The reason for the form we chose: no other is faster."""
    rivals = [
        row["ratio"] for row in report.rows
        if row["tokens"] == tokens and row["form"] != _OURS and "ratio" in row
    ]  # fmt: skip
    what = f"{tokens} tokens: fastest other form / ours"
    report.goals.append(Goal(what, min(rivals, default=None), 1.0))


if __name__ == "__main__":
    main()
