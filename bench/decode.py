"""Seconds per decode step, ours against transformers and against the graph its exporter writes.

The stack m4 (4 layers, hidden 2048, 16 heads, rank 512), random weights, fp32, one row, contexts
of 512 to 8192 tokens, all contenders in turn in one run, on the same cache rows; then the
attention of one layer alone. Before timing, logits are compared:
of a short prompt, and of the timed step.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import stack
import torch
from attention import LONG, profile_attention, time_attention
from attention_graphs import Sizes
from interleave import Timing, integers, interleave
from line_up import PROMPT, open_contenders, random_rows
from op_profile import profile_bundle
from peers import Contender
from provenance import provenance
from table import Goal, Report, bench_arguments, show

from mla_deploy.export import export

SHORT = 512


def main() -> None:
    parser = bench_arguments(__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=integers, default=(512, 2048, 8192))
    parser.add_argument("--skip-exporter", action="store_true", help="leave out OnnxExporter")
    parser.add_argument("--profile", action="store_true", help="our step by operator")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = Report("decode", {})
    timing = {"threads": options.threads, "realtime": options.realtime}
    with ExitStack() as cleanup:
        work = Path(tempfile.mkdtemp(prefix="bench-decode-", dir=options.work))
        cleanup.callback(shutil.rmtree, work, ignore_errors=True)
        fields = stack.m4(options.layers)
        checkpoint = stack.write_checkpoint(work / "checkpoint", fields)
        bundle = export(checkpoint, work / "bundle", capacity=max(options.context) + len(PROMPT))
        contenders, parity = open_contenders(checkpoint, bundle, options)
        report.provenance = provenance(
            **timing, dtype="fp32", batch=1, layers=options.layers, contexts=options.context,
            prompt_max_logit_difference=parity,
        )  # fmt: skip
        medians = _time_steps(contenders, fields, options, report)
        report.goals += _goals(medians)
        if options.profile:
            report.rows += profile_bundle(bundle, max(options.context), **timing)
    sizes = Sizes.of(fields)
    rows, goals = time_attention(
        sizes, options.context, options.rounds, layers=options.layers, **timing
    )
    report.rows, report.goals = report.rows + rows, report.goals + goals
    if options.profile:
        report.rows += profile_attention(sizes, max(options.context), **timing)
    show(report, options.json)


def _time_steps(
    contenders: dict[str, Contender], fields: dict[str, Any], options: Any, report: Report
) -> dict[int, dict[str, Timing]]:
    medians: dict[int, dict[str, Timing]] = {}
    width = fields["kv_lora_rank"] + fields["qk_rope_head_dim"]
    for context in options.context:
        rows = random_rows(options.layers, context - 1, width)
        logits = {}
        for name, contender in contenders.items():
            contender.fill(rows)
            logits[name] = contender.step()
        calls = {name: contender.step for name, contender in contenders.items()}
        found = interleave(calls, options.rounds, realtime=options.realtime)
        medians[context] = found
        for name, timing in found.items():
            report.rows.append({
                "table": "one decode step", "contender": name, "context": context,
                **timing.to_dict(), "ratio": timing.median / found["ours"].median,
                "logit_difference": float(np.abs(logits[name] - logits["ours"]).max()),
            })  # fmt: skip
    return medians


def _goals(found: dict[int, dict[str, Timing]]) -> list[Goal]:
    """What was promised of the step, at the two contexts that it was promised for."""
    short, long = (found.get(context, {}) for context in (SHORT, LONG))
    goals = []
    for peer, wanted in (("transformers", 20.0), ("OnnxExporter", 15.0)):
        best = min((t.median for n, t in long.items() if n.startswith(peer)), default=None)
        ratio = None if best is None else best / long["ours"].median
        goals.append(Goal(f"step at {LONG}: best of {peer} / ours", ratio, wanted))
    growth = long["ours"].median / short["ours"].median if short and long else None
    what = f"own step at {LONG} / own step at {SHORT}"
    return [*goals, Goal(what, growth, 1.7, at_least=False)]


if __name__ == "__main__":
    main()
