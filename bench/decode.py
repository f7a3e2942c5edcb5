"""Seconds per decode step, ours against transformers and against the graph its exporter writes.

The stack m4 (4 layers, hidden 2048, 16 heads, rank 512), random weights, fp32, one row, contexts
of 512 to 8192 tokens, as `mla-deploy bench` times them: every contender a process, in turn, on the
same cache rows, logits of a short prompt compared before. Then the attention of one layer alone.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import stack
from attention import LONG, profile_attention, time_attention
from attention_graphs import Sizes
from op_profile import profile_bundle
from peer_report import figure_rows
from table import Goal, Report, bench_arguments, show

from mla_deploy.bench.compare import compare
from mla_deploy.bench.comparison import Comparison
from mla_deploy.bench.sizes import token_counts
from mla_deploy.export import export

SHORT = 512
_PEERS = (("transformers", 20.0), ("onnx-exporter", 15.0))


def main() -> None:
    parser = bench_arguments(__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=token_counts, default=(512, 2048, 8192))
    parser.add_argument("--skip-exporter", action="store_true", help="leave out OnnxExporter")
    parser.add_argument("--profile", action="store_true", help="our step by operator")
    options = parser.parse_args()
    report = Report("decode", {})
    timing = {"threads": options.threads, "realtime": options.realtime}
    fields = stack.m4(options.layers)
    with ExitStack() as cleanup:
        work = Path(tempfile.mkdtemp(prefix="bench-decode-", dir=options.work))
        cleanup.callback(shutil.rmtree, work, ignore_errors=True)
        checkpoint = stack.write_checkpoint(work / "checkpoint", fields)
        bundle = export(checkpoint, work / "bundle", capacity=max(options.context))
        peers = [name for name, _ in _PEERS[: 1 if options.skip_exporter else 2]]
        found = compare(
            bundle, against=peers, source=checkpoint, context=options.context,
            rounds=options.rounds, work=work, **timing,
        )  # fmt: skip
        report.provenance = dict(found.provenance)
        report.rows += figure_rows(found.to_dict())
        report.goals += _goals(found)
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


def _goals(found: Comparison) -> list[Goal]:
    """What was promised of the step, at the two contexts that it was promised for."""
    goals = []
    for peer, wanted in _PEERS:
        best = found.best("step", LONG, peer)
        ratio = None if best is None else found.ratio(best)
        goals.append(Goal(f"step at {LONG}: best of {peer} / ours", ratio, wanted))
    own = [found.best("step", size, found.ours) for size in (LONG, SHORT)]
    long, short = (None if figure is None else figure.timing for figure in own)
    growth = long.median / short.median if long and short else None
    what = f"own step at {LONG} / own step at {SHORT}"
    return [*goals, Goal(what, growth, 1.7, at_least=False)]


if __name__ == "__main__":
    main()
