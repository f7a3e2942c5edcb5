"""Seconds and peak memory of `rewrite` on a deep graph with weights beside it.

27 layers of DeepSeek-V2-Lite's form at 1024 hidden, keys and values of every head cached, as
optimum writes them. Each round is a process of its own; its memory is VmHWM, mapped pages counted.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

from scripts import run_script
from table import Goal, Report, bench_arguments, show

from mla_deploy.bench.interleave import Timing
from mla_deploy.bench.provenance import provenance

_MOST_SECONDS, _MOST_OVER_WEIGHTS_MIB, _CLOSE = 30.0, 1024.0, 1e-4


def main() -> None:
    parser = bench_arguments(__doc__)
    parser.set_defaults(rounds=3)
    parser.add_argument("--layers", type=int, default=27)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="mla-deploy-bench-"))
    try:
        model = work / "model.onnx"
        if not model.exists():
            run_script("rewrite_once.py", "write", model, options.layers)
        results = [
            json.loads(run_script("rewrite_once.py", "rewrite", model, work / "bundle"))
            for _ in range(options.rounds)
        ]
    finally:
        if options.work is None:
            shutil.rmtree(work)
    timing = Timing(tuple(each["seconds"] for each in results))
    over = max((each["peak_bytes"] - each["weight_bytes"]) / 2**20 for each in results)
    report = Report("rewrite", provenance(options.threads))
    report.rows = [{
        "table": "rewrite", "layers": options.layers, "call_s": timing.median,
        "spread_s": f"{timing.best:.1f}-{max(timing.seconds):.1f}",
        "processor_s": min(each["processor_seconds"] for each in results),
        "weights_MiB": results[0]["weight_bytes"] / 2**20,
        "peak_MiB": max(each["peak_bytes"] for each in results) / 2**20,
        "cache_before_B": results[0]["cached_before"], "cache_B": results[0]["cached"],
    }]  # fmt: skip
    report.goals = [
        Goal("seconds of the call", timing.median, _MOST_SECONDS, "s", at_least=False),
        Goal("peak memory over the weights", over, _MOST_OVER_WEIGHTS_MIB, "MiB", at_least=False),
        Goal("largest logit difference", max(each["max_abs"] for each in results), _CLOSE, "",
             at_least=False),
    ]  # fmt: skip
    show(report, options.json)


if __name__ == "__main__":
    sys.exit(main())
