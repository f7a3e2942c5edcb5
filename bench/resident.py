"""Memory of a process that holds both graphs of quantised weights, against decode alone.

The stack m4 in int4 and int8: one session for decode, a session for each graph, and the joined
graph in one session; after a prompt and some steps. Each figure is of a process of its
own, the least of `--rounds`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import stack
from scripts import run_script
from table import Goal, Report, bench_arguments, show
from verbs import exported

from mla_deploy.bench.provenance import provenance

_HOW = ("decode", "apart", "joined")
_WANTED = 1.15


def main() -> None:
    parser = bench_arguments(__doc__)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    facts = provenance(options.threads, prompt=options.prompt, steps=options.steps)
    report = Report("resident memory", facts)
    with tempfile.TemporaryDirectory(prefix="bench-resident-") as folder:
        work = options.work or Path(folder)
        checkpoint = stack.kept_m4(work, options.layers)
        for form in ("int4", "int8"):
            _measure(form, exported(checkpoint, form, work), report, options)
    show(report, options.json)


def _measure(form: str, bundle: Path, report: Report, options: Any) -> None:
    figures = {}
    for how in _HOW:
        found = [
            float(run_script("resident_one.py", bundle, how, options.prompt, options.steps))
            for _ in range(options.rounds)
        ]
        figures[how] = min(found)
    row = {f"{how}, MiB": round(value, 1) for how, value in figures.items()}
    report.rows.append({"table": "PSS of the process", "weights": form, **row})
    ratio = figures["joined"] / figures["decode"]
    report.goals.append(
        Goal(f"both graphs over decode alone, {form}", ratio, _WANTED, at_least=False)
    )


if __name__ == "__main__":
    main()
