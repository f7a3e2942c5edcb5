"""Ours against every peer, row by row, each against its goal: the table of docs/benchmarks.md.

Writes the stack m4, exports the forms that the rows need, and runs `mla-deploy bench` once per row;
a row's result is one JSON file. With --work kept, a run goes on where it was stopped: name the rows
that are left with --rows. A form that this build does not know is told as not run.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import stack
from peer_report import figure_rows, row_goals
from peer_rows import FORMS, LOSS, ROWS, PeerRow
from scripts import run_script
from table import Report, bench_arguments, show
from verbs import NotRun, exported, run_verb


def main() -> None:
    parser = bench_arguments(__doc__)
    parser.add_argument("--rows", default=",".join((*ROWS, LOSS)), help="some of them, by comma")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--longest", type=int, default=1 << 20, help="leave out longer contexts")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"))
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    names = options.rows.split(",")
    unknown = set(names) - {*ROWS, LOSS}
    if unknown:
        parser.error(f"no row is called {', '.join(sorted(unknown))}; {', '.join((*ROWS, LOSS))}")
    with tempfile.TemporaryDirectory(prefix="bench-all-") as temporary:
        work = options.work or Path(temporary)
        for name in names:
            path = options.results / f"peers_{name.replace('-', '_')}.json"
            try:
                if name == LOSS:
                    print(run_script("loss.py", "--work", work, "--json", path))
                else:
                    show(_measured(name, ROWS[name], work, options), str(path))
            except (NotRun, subprocess.CalledProcessError) as problem:
                print(f"     not run  {name}: {problem}", flush=True)


def _measured(name: str, row: PeerRow, work: Path, options: Any) -> Report:
    checkpoint = stack.kept_m4(work, options.layers)
    against = row.against
    if against in FORMS:
        against = str(exported(checkpoint, against, work))
    contexts = [size for size in row.steps if size <= options.longest]
    arguments = ["--against", against, "--source", checkpoint, "--work", work,
                 "--context", ",".join(map(str, contexts)), "--threads", options.threads,
                 "--rounds", options.rounds]  # fmt: skip
    if row.held:
        arguments.append("--hold-weights")
    if row.prefills:
        arguments += ["--prefill", ",".join(map(str, row.prefills))]
    result = run_verb("bench", exported(checkpoint, row.form, work), *arguments)
    facts = {part: result[part] for part in ("machine", "versions", "settings")}
    versions = [c.get("versions", {}) for c in result["contenders"].values()]
    facts["versions"] = {
        **facts["versions"],
        **{k: v for found in versions for k, v in found.items()},
    }
    report = Report(f"peers: {name}", facts, list(figure_rows(result)), row_goals(row, result))
    for label, contender in result["contenders"].items():
        if "failed" in contender:
            print(f"     not run  {label}: {contender['failed']}", flush=True)
    return report


if __name__ == "__main__":
    main()
