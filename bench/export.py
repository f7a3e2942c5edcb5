"""Seconds and peak memory of an export, each in a process of its own.

A DeepSeek-V2-Lite-shaped model of small width (27 layers, 64 experts, top 6) against the same with
4 layers: a graph is traced once per layer kind, so depth should cost little. A checkpoint of large
tensors: memory should follow one tensor, not the model. And transformers' own OnnxExporter on the
4-layer one, within a time limit. With `--families`, every family's seconds instead (families.py).
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import stack
from export_rows import export_once, export_row, peer_row
from families import measure_families
from scripts import run_script
from table import Goal, Report, bench_arguments, show

from mla_deploy.bench.provenance import provenance

_MOST_SECONDS, _MOST_GROWTH, _MOST_GIB = 30.0, 2.0, 1.5


def main() -> None:
    parser = bench_arguments(__doc__)
    parser.set_defaults(rounds=3)
    parser.add_argument("--layers", type=int, default=27, help="of the deep model")
    parser.add_argument("--big-vocab", type=int, default=1 << 16, help="rows of the largest tensor")
    parser.add_argument(
        "--limit", type=float, default=300, help="seconds for other exporters; 0 skips them"
    )
    parser.add_argument("--families", nargs="*", metavar="NAME", help="seconds of each family")
    options = parser.parse_args()
    with ExitStack() as cleanup:
        work = Path(tempfile.mkdtemp(prefix="bench-export-", dir=options.work))
        cleanup.callback(shutil.rmtree, work, ignore_errors=True)
        if options.families is not None:
            report = Report("families", provenance(options.threads, limit_seconds=options.limit))
            measure_families(report, options.families, work, options)
        else:
            report = Report("export", provenance(
                options.threads, rounds=options.rounds, dtype="bf16 checkpoint, fp32 bundle",
                realtime=options.realtime, limit_seconds=options.limit,
            ))  # fmt: skip
            _measure(work, options, report)
    show(report, options.json)


def _measure(work: Path, options: Any, report: Report) -> None:
    models = {
        "shallow": {**stack.LITE, "num_hidden_layers": 4},
        "deep": {**stack.LITE, "num_hidden_layers": options.layers},
        "big tensors": stack.m4(2, vocab_size=options.big_vocab),
    }
    for name, fields in models.items():
        run_script("stack.py", work / name, json.dumps(fields), "BF16")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for number in range(options.rounds):
        for name, results in found.items():
            results.append(
                export_once(work / name, work / "bundle", options.threads, options.realtime)
            )
            seconds = results[-1]["process_seconds"]
            print(f"round {number + 1}: {name}, {seconds:.1f} s", file=sys.stderr, flush=True)
    for name, results in found.items():
        report.rows.append(export_row(name, models[name], results, work / name))
    if options.limit:
        report.rows.append(peer_row(work, options.limit))
    shallow, deep, big = (row for row in report.rows[:3])
    largest = big["largest_MiB"] / 1024
    report.goals += [
        Goal("deep export, the whole process", deep["process_s"], _MOST_SECONDS, "s", False),
        Goal("deep export / shallow export, the call alone",
             deep["call_s"] / shallow["call_s"], _MOST_GROWTH, at_least=False),
        Goal("peak memory, big tensors", big["peak_MiB"] / 1024, _MOST_GIB + largest, "GiB", False),
        Goal("peak memory, deep", deep["peak_MiB"] / 1024,
             _MOST_GIB + deep["largest_MiB"] / 1024, "GiB", False),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
