"""Weights in huge pages against pages of 4 KiB: one decode step of m4.

Each form in two processes that take turns. Packed weights are moved, or left as ONNX Runtime took
them; float ones are held (`--hold-weights`), or mapped from their file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import stack
from table import Goal, Report, bench_arguments, show
from verbs import exported

from mla_deploy.bench.interleave import Timing
from mla_deploy.bench.peer import ContenderSpec, Peer
from mla_deploy.bench.provenance import provenance

Ways = Mapping[str, Mapping[str, bool]]  # what is told of a process, and options of its contender

_PACKED: Ways = {"moved": {}, "as taken": {"huge_pages": False}}
_FLOAT: Ways = {"held": {"hold_weights": True}, "mapped": {}}
# The first of two ways is the one in huge pages.
_FORMS = {"int4": _PACKED, "int4-block128": _PACKED, "int8": _PACKED, "fp32": _FLOAT}
_STEPS = 10  # of a process per turn


def main() -> None:
    parser = bench_arguments(__doc__)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    facts = provenance(options.threads, context=options.context, layers=options.layers)
    report = Report("huge pages", facts)
    with tempfile.TemporaryDirectory(prefix="bench-pages-") as folder:
        work = options.work or Path(folder)
        checkpoint = stack.kept_m4(work, options.layers)
        for form, ways in _FORMS.items():
            _measure(form, ways, exported(checkpoint, form, work), report, options)
    show(report, options.json)


def _measure(form: str, ways: Ways, bundle: Path, report: Report, options: Any) -> None:
    found: dict[str, list[float]] = {how: [] for how in ways}
    with ExitStack() as cleanup:
        peers = {
            how: cleanup.enter_context(_peer(bundle, how, given, options))
            for how, given in ways.items()
        }
        for _ in range(options.rounds):
            for how, peer in peers.items():
                asked = {"repeat": _STEPS, "warm": 1, "realtime": options.realtime}
                found[how] += peer.ask("step", **asked)["seconds"]
    timings = {how: Timing(tuple(seconds)) for how, seconds in found.items()}
    for how, timing in timings.items():
        moved = peers[how].facts["in_huge_pages"] / 2**20
        row = {"weights": form, "pages": how, "in_huge_pages_MiB": moved, **timing.to_dict()}
        report.rows.append({"table": f"decode step at {options.context}", **row})
    huge, small = ways
    ratio = timings[small].median / timings[huge].median
    report.goals.append(Goal(f"step, {form}: {small} / {huge}", ratio, 1.0))


def _peer(bundle: Path, how: str, given: Mapping[str, bool], options: Any) -> Peer:
    shared = {"path": str(bundle), "threads": options.threads, "capacity": options.context}
    peer = Peer(ContenderSpec(how, how, "bundle", {**shared, **given}))
    peer.load()
    peer.ask("fill", context=options.context)
    return peer


if __name__ == "__main__":
    main()
