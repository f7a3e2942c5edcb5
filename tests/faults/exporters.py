"""Whole exports, by the command, that are interrupted, killed, starved or raced; run as a program.

`python -m tests.faults.exporters` reads {experiment: options} on stdin and prints what it saw. One
export has been traced when it forks the others, so that a round costs a second; a "cold" round
traces again, which is where an export spends its time. What stands at the output is "absent",
"old", "new", or "torn".
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.progress  # noqa: F401 - what every forked command would import by itself

import mla_deploy
from mla_deploy.cli import bundle_sheets, entry  # noqa: F401
from mla_deploy.errors import MlaDeployError
from mla_deploy.export import trace
from tests.tiny import write_tiny

ROOT = Path(__file__).parents[2]
# A run that was hit early or late proves little: go on until both were seen, within reason.
_MOST_ROUNDS = 4


def call(folder: Path, **experiments: dict[str, Any]) -> dict[str, Any]:
    """Run experiments in a process of their own; each one's answer under its name."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.exporters"],
        input=json.dumps({"folder": str(folder), "experiments": experiments}),
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=900,
    )
    if done.returncode != 0:
        raise AssertionError(f"the exporters ended with {done.returncode}:\n{done.stderr}")
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


@dataclass(frozen=True)
class Ended:
    """One export command that ended: its status (minus the signal that killed it) and its word."""

    status: int
    code: str  # of the one object on stdout; "" when it ended well, "?" when there is none
    seconds: float  # since the first signal


class Place:
    """A folder with the checkpoint `model`, where `out` is exported to; two bundles in reserve."""

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder = folder / "place"
        self.reserve = folder / "reserve"
        self.out = self.folder / "out"
        self.model = write_tiny(self.folder / "model", "youtu")
        self.reserve.mkdir()
        self.digests = {
            mla_deploy.export(self.model, self.reserve / name, dtype=dtype).digest: name
            for name, dtype in (("old", "bf16"), ("new", "fp32"))
        }

    def start_over(self, *, with_old: bool) -> None:
        """Only the checkpoint, and the old bundle if asked."""
        for path in self.folder.iterdir():
            if path != self.model:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if with_old:
            shutil.copytree(self.reserve / "old", self.out)

    def state(self) -> str:
        """What a reader finds at the output, every byte checked."""
        if not os.path.lexists(self.out):
            return "absent"
        try:
            return self.digests[mla_deploy.open_bundle(self.out).digest]
        except (MlaDeployError, KeyError) as error:
            return f"torn: {error}"

    def leftovers(self) -> list[str]:
        """What stands beside checkpoint and output."""
        return sorted({path.name for path in self.folder.iterdir()} - {"model", "out"})

    def begin(self, *options: str, prepare: Callable[[], None] = lambda: None) -> Exporter:
        """Fork an export; returns when its command line has begun."""
        arguments = ["export", str(self.model), "--out", str(self.out), "--json", *options]
        return Exporter(arguments, prepare)

    def require_recovery(self) -> None:
        """The next export succeeds whatever was left, and leaves nothing else behind."""
        ended = self.begin("--replace").end()
        if (ended.status, self.state(), self.leftovers()) != (0, "new", []):
            raise AssertionError(f"recovery: {ended}, {self.state()}, {self.leftovers()}")


class Exporter:
    """A forked process in the middle of `mla-deploy export`."""

    def __init__(self, arguments: list[str], prepare: Callable[[], None]) -> None:
        begun, says_begun = os.pipe()
        self._stdout, stdout = os.pipe()
        self._child = os.fork()
        if not self._child:
            _run(arguments, prepare, says_begun, stdout)
        os.close(says_begun)
        os.close(stdout)
        os.read(begun, 1)
        os.close(begun)

    def end(self, *numbers: int, gap: float = 0.0) -> Ended:
        """Send signals, wait for the end, read what it said."""
        started = time.monotonic()
        for number in numbers:
            os.kill(self._child, number)
            time.sleep(gap)
        with os.fdopen(self._stdout) as said:
            text = said.read()
        status = os.waitstatus_to_exitcode(os.waitpid(self._child, 0)[1])
        seconds = time.monotonic() - started
        try:
            told = json.loads(text)
            return Ended(status, "" if told["ok"] else told["error"]["code"], seconds)
        except ValueError:
            return Ended(status, "?", seconds)


def _run(arguments: list[str], prepare: Callable[[], None], begun: int, stdout: int) -> None:
    """In the child: the command, from its first line to its exit status."""
    status = 1
    try:
        os.dup2(stdout, 1)
        # What `main` finds and restores: a signal before or after it is not what is tested here.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        run = entry._run

        def announced(*given: Any) -> int:
            os.write(begun, b"1")
            return run(*given)

        entry._run = announced
        prepare()
        status = entry.main(arguments)
    finally:
        os._exit(status)


# ------------------------------------------------------------------ the experiments


def signals(
    place: Place,
    *,
    rounds: int,
    seed: int,
    numbers: list[int],
    cold: bool = False,
    gap: float = 0.0,
) -> dict[str, Any]:
    """Send the signals `numbers` at a random instant of an export's span, over and over."""
    randomness = random.Random(seed)
    prepare = trace._TRACES.clear if cold else lambda: None
    span = _span(place, prepare, 1 if cold else 3)
    seen: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    leftovers: Counter[str] = Counter()
    slowest, done = 0.0, 0
    while done < rounds or (not cold and done < rounds * _MOST_ROUNDS and not _covered(seen)):
        replace = bool(done % 2)
        place.start_over(with_old=replace)
        exporter = place.begin(*(["--replace"] if replace else []), prepare=prepare)
        time.sleep(randomness.uniform(0, (0.95 if cold else 1.2) * span))
        ended = exporter.end(*numbers, gap=gap)
        ends[f"{ended.status} {ended.code}".strip()] += 1
        slowest = max(slowest, ended.seconds)
        seen[("replace:" if replace else "fresh:") + place.state()] += 1
        leftovers.update(map(_kind, place.leftovers()))
        place.require_recovery()
        done += 1
    return {
        "rounds": done, "span_seconds": span, "states": seen, "ends": ends,
        "leftovers": leftovers, "slowest_seconds": slowest,
    }  # fmt: skip


def file_size_limit(place: Place, steps: int) -> dict[str, Any]:
    """RLIMIT_FSIZE from 0 up to the largest file: the write that crosses it fails."""
    largest = max(path.stat().st_size for path in (place.reserve / "new").iterdir())
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    seen: Counter[str] = Counter()
    for replace in (False, True):
        for limit in [0, 1, *range(13, largest, largest // steps), largest - 1]:
            place.start_over(with_old=replace)
            bound = (limit, hard)
            ended = place.begin(
                *(["--replace"] if replace else []),
                prepare=lambda bound=bound: resource.setrlimit(resource.RLIMIT_FSIZE, bound),
            ).end()
            where = "replace" if replace else "fresh"
            seen[f"{where}:{place.state()}:{ended.status} {ended.code}:{place.leftovers()}"] += 1
    return {"seen": seen}


def race(place: Place, rounds: int, exporters: int, replace: bool) -> dict[str, Any]:
    """Exports to one output, started together."""
    bad: list[Any] = []
    winners: Counter[str] = Counter()
    for _ in range(rounds):
        place.start_over(with_old=replace)
        options = ["--replace"] if replace else []
        ends = [entrant.end() for entrant in [place.begin(*options) for _ in range(exporters)]]
        winners[str(sum(ended.status == 0 for ended in ends))] += 1
        codes = {ended.code for ended in ends}
        statuses = {ended.status for ended in ends}
        if (
            statuses - {0, 8}
            or codes - {"", "BUN-BUSY", "BUN-EXISTS"}
            or (place.state(), place.leftovers()) != ("new", [])
        ):
            bad.append([str(ends), place.state(), place.leftovers()])
    return {"winners": winners, "bad": bad}


def as_nobody(place: Place) -> dict[str, Any]:
    """An export with no right to write in the folder."""
    place.start_over(with_old=True)
    place.folder.chmod(0o555)
    try:
        ended = place.begin("--replace", prepare=_drop_rights).end()
    finally:
        place.folder.chmod(0o755)
    return {"status": ended.status, "code": ended.code, "state": place.state(),
            "leftovers": place.leftovers()}  # fmt: skip


def _drop_rights() -> None:
    if os.geteuid() == 0:
        os.setuid(65534)


def _span(place: Place, prepare: Callable[[], None], times: int) -> float:
    """Seconds that a whole export takes, from its first line."""
    spans = []
    for _ in range(times):
        place.start_over(with_old=True)
        ended = place.begin("--replace", prepare=prepare).end()
        if (ended.status, place.state()) != (0, "new"):
            raise AssertionError(f"an export that nobody disturbed: {ended}, {place.state()}")
        spans.append(ended.seconds)
    return statistics.median(spans)


def _covered(seen: Counter[str]) -> bool:
    return {"fresh:absent", "fresh:new", "replace:old", "replace:new"} <= set(seen)


def _kind(name: str) -> str:
    return "stage" if ".partial-" in name else "lock" if name.endswith(".lock") else name


def _answer(experiments: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    place = Place(folder)
    known = {e.__name__: e for e in (signals, file_size_limit, race, as_nobody)}
    answer: dict[str, Any] = {}
    for name, options in experiments.items():
        try:
            answer[name] = known[options.pop("of", name)](place, **options)
        except Exception:
            answer[name] = {"failed": traceback.format_exc()}
    return answer


if __name__ == "__main__":
    _wanted = json.load(sys.stdin)
    _real_stdout = os.dup(1)
    os.dup2(2, 1)  # what libraries print
    _answered = _answer(_wanted["experiments"], Path(_wanted["folder"]))
    os.write(_real_stdout, json.dumps(_answered).encode())
