"""Processes that write bundles and are killed, interrupted or raced; run as a program.

`python -m tests.faults.writers '<json>'` forks its writers from one small single-threaded process,
which is quick and safe, and prints what it saw as one JSON object. Two contents exist, "old" and
"new"; a final path is "absent", "old", "new", or "torn".
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
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mla_deploy.bundle import open_bundle, stage_bundle
from mla_deploy.errors import MlaDeployError
from tests.faults.faulty_fs import ScriptedFileSystem, killed
from tests.small_bundle import FILES, manifest, write_bundle

ROOT = Path(__file__).parents[2]
CONTENTS = {
    label: {**FILES, "weights.safetensors": label.encode() * 20_000} for label in ("old", "new")
}
_PIECES = 4  # a writer pauses between pieces of the weights, so that there is a span to hit
_PAUSE_SECONDS = 0.0005
# A run that was hit early or late proves little: go on until both were seen, within reason.
_MOST_ROUNDS = 4


def call(experiment: str, **options: Any) -> dict[str, Any]:
    """Run one experiment in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.faults.writers"],
        input=json.dumps({"experiment": experiment, **options}),
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=600,
    )
    if done.returncode != 0:
        raise AssertionError(f"{experiment} ended with {done.returncode}:\n{done.stderr}")
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


def write_slowly(out: Path, *, replace: bool = False) -> None:
    """Publish the new content, with pauses."""
    with stage_bundle(out, replace=replace) as stage:
        for name, data in CONTENTS["new"].items():
            with stage.create(name) as file:
                size = -(-len(data) // _PIECES)
                for start in range(0, len(data), size):
                    file.write(data[start : start + size])
                    time.sleep(_PAUSE_SECONDS)
        stage.publish(manifest())


def state_of(out: Path) -> str:
    """What a reader finds at `out`, every byte checked."""
    if not os.path.lexists(out):
        return "absent"
    try:
        weights = open_bundle(out).read_bytes("weights.safetensors")
    except MlaDeployError as error:
        return f"torn: {error}"
    return next(label for label in CONTENTS if weights == CONTENTS[label]["weights.safetensors"])


def fork(work: Callable[[], None]) -> int:
    """A child that runs `work` and exits as the command line would."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        try:
            work()
            status = 0
        except MlaDeployError as error:
            status = error.exit_status
        except SystemExit as error:
            status = int(error.code or 0)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except KeyboardInterrupt:
        status = 130
    finally:
        os._exit(status)


def exit_of(child: int) -> int:
    """The child's exit status; minus the signal if one killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def start_over(folder: Path, *, with_old: bool) -> Path:
    """An empty folder, with the old bundle in it if asked; the path of the bundle."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if with_old:
        write_bundle(folder / "out", CONTENTS["old"])
    return folder / "out"


def signals(
    folder: str, rounds: int, seed: int, numbers: list[int], gap: float = 0.0
) -> dict[str, Any]:
    """Send the signals `numbers` to a writer at a random instant of its span, over and over."""
    randomness = random.Random(seed)
    span = _span(Path(folder))
    seen: Counter[str] = Counter()
    exits: Counter[str] = Counter()
    leftovers: Counter[str] = Counter()
    slowest = 0.0
    done = 0
    while done < rounds or (done < rounds * _MOST_ROUNDS and not _covered(seen)):
        replace = bool(done % 2)
        out = start_over(Path(folder), with_old=replace)
        ready, started_end = os.pipe()
        child = fork(partial(_obedient, out, started_end, replace=replace))
        os.close(started_end)
        os.read(ready, 1)
        os.close(ready)
        time.sleep(randomness.uniform(0, 1.2 * span))
        started = time.monotonic()
        for number in numbers:
            os.kill(child, number)
            time.sleep(randomness.uniform(0, gap))
        exits[str(exit_of(child))] += 1
        slowest = max(slowest, time.monotonic() - started)
        seen[("replace:" if replace else "fresh:") + state_of(out)] += 1
        leftovers.update(_kind(path.name) for path in out.parent.iterdir() if path != out)
        _require_recovery(out)
        done += 1
    return {
        "rounds": done, "span_seconds": span, "states": seen, "exits": exits,
        "leftovers": leftovers, "slowest_seconds": slowest,
    }  # fmt: skip


def kill_at_each_call(folder: str) -> dict[str, Any]:
    """kill -9 just before every call that changes the disk, and after the last one."""
    seen: Counter[str] = Counter()
    for replace in (False, True):
        counting = ScriptedFileSystem()
        out = start_over(Path(folder), with_old=replace)
        write_bundle(out, CONTENTS["new"], replace=replace, fs=counting)
        calls = len(counting.log)
        for number in range(1, calls + 2):
            out = start_over(Path(folder), with_old=replace)
            fs = killed(min(number, calls), after=number > calls)
            child = fork(partial(_publish_new, out, replace=replace, fs=fs))
            if exit_of(child) != -signal.SIGKILL:
                raise AssertionError(f"call {number} of {calls} was not reached")
            seen[("replace:" if replace else "fresh:") + state_of(out)] += 1
            _require_recovery(out)
    return {"rounds": seen.total(), "states": seen}


def race(folder: str, rounds: int, writers: int, replace: bool) -> dict[str, Any]:
    """Writers of one output, started together."""
    bad: list[Any] = []
    wins: Counter[str] = Counter()
    for _ in range(rounds):
        out = start_over(Path(folder), with_old=replace)
        read_end, write_end = os.pipe()

        def work(out: Path = out, start: int = read_end, others: int = write_end) -> None:
            os.close(others)
            os.read(start, 1)  # returns when the parent closes its end
            write_slowly(out, replace=replace)

        children = [fork(work) for _ in range(writers)]
        os.close(write_end)
        exits = sorted(exit_of(child) for child in children)
        os.close(read_end)
        wins[str(exits.count(0))] += 1
        names = [path.name for path in out.parent.iterdir()]
        if set(exits) - {0, 8} or state_of(out) != "new" or names != ["out"]:
            bad.append([exits, state_of(out), names])
    return {"rounds": rounds, "winners": wins, "bad": bad}


def out_of_memory(folder: str) -> dict[str, Any]:
    """A writer that needs more memory than it may have."""
    out = start_over(Path(folder), with_old=True)

    def work() -> None:
        limit = 1 << 30
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        with stage_bundle(out, replace=True) as stage:
            stage.write_bytes("weights.safetensors", bytes(4 << 30))

    return {"exit": exit_of(fork(work)), "state": state_of(out), "names": os.listdir(folder)}


def as_nobody(folder: str) -> dict[str, Any]:
    """A writer with no right to write in the folder."""
    out = start_over(Path(folder), with_old=False)
    out.parent.chmod(0o555)

    def work() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        write_slowly(out)

    return {"exit": exit_of(fork(work)), "names": os.listdir(folder)}


def _obedient(out: Path, ready: int, *, replace: bool) -> None:
    """A writer that treats SIGINT and SIGTERM as the command line does, from `ready` on."""

    def terminate(number: int, frame: Any) -> None:
        raise SystemExit(143)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, terminate)
    os.write(ready, b"1")
    write_slowly(out, replace=replace)


def _publish_new(out: Path, *, replace: bool, fs: ScriptedFileSystem) -> None:
    write_bundle(out, CONTENTS["new"], replace=replace, fs=fs)


def _span(folder: Path) -> float:
    """Seconds that a whole writer takes, fork included."""
    times = []
    for _ in range(5):
        out = start_over(folder, with_old=True)
        started = time.monotonic()
        exit_of(fork(partial(write_slowly, out, replace=True)))
        times.append(time.monotonic() - started)
    return statistics.median(times)


def _covered(seen: Counter[str]) -> bool:
    return {"fresh:absent", "fresh:new", "replace:old", "replace:new"} <= set(seen)


def _require_recovery(out: Path) -> None:
    """The next run succeeds whatever was left, and leaves nothing else behind."""
    write_bundle(out, CONTENTS["new"], replace=True)
    names = [path.name for path in out.parent.iterdir()]
    if state_of(out) != "new" or names != ["out"]:
        raise AssertionError(f"after recovery: {state_of(out)}, {names}")


def _kind(name: str) -> str:
    return "stage" if ".partial-" in name else "lock" if name.endswith(".lock") else name


_EXPERIMENTS = (signals, kill_at_each_call, race, out_of_memory, as_nobody)

if __name__ == "__main__":
    _options = json.load(sys.stdin)
    _name = _options.pop("experiment")
    print(json.dumps({e.__name__: e for e in _EXPERIMENTS}[_name](**_options)))
