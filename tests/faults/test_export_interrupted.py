"""Export interrupted, killed, without room, without rights, raced: by the command, at any moment.

All of it happens in one child process, which traces a model once (`exporters.py`).
`MLA_DEPLOY_FAULT_ROUNDS` multiplies the rounds.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import run_child
from tests.faults import exporters

TIMES = int(os.environ.get("MLA_DEPLOY_FAULT_ROUNDS", "1"))
WHOLE = {"fresh:absent", "fresh:new", "replace:old", "replace:new"}
MAX_SECONDS = 5.0  # from the signal to the exit


@pytest.fixture(scope="module")
def seen() -> Iterator[dict[str, Any]]:
    """What each experiment saw; on a memory file system where there is one."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="mla-deploy-", dir=memory))
    folder.chmod(0o755)  # let an unprivileged exporter come near
    warm: dict[str, Any] = {"of": "signals", "rounds": 8 * TIMES}
    cold: dict[str, Any] = {"of": "signals", "rounds": 2 * TIMES, "cold": True}
    yield exporters.call(
        folder / "exports",
        as_nobody={},
        ctrl_c={**warm, "seed": 1, "numbers": [2]},
        ctrl_c_twice={**warm, "seed": 2, "numbers": [2, 2], "gap": 0.002},
        ctrl_c_cold={**cold, "seed": 3, "numbers": [2]},
        sigterm={**warm, "seed": 4, "numbers": [15]},
        sigterm_cold={**cold, "seed": 5, "numbers": [15]},
        kill={**warm, "seed": 6, "numbers": [9]},
        file_size_limit={"steps": 4 * TIMES},
        race_fresh={"of": "race", "rounds": 2 * TIMES, "exporters": 3, "replace": False},
        race_replace={"of": "race", "rounds": 2 * TIMES, "exporters": 3, "replace": True},
    )
    shutil.rmtree(folder)


def answer(seen: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = seen[name]
    print(name, found)
    assert "failed" not in found, found["failed"]
    return found


@pytest.mark.parametrize(
    ("name", "end"),
    [
        pytest.param("ctrl_c", "130 CLI-INTERRUPTED", id="F_WR_02_ctrl_c"),
        pytest.param("ctrl_c_cold", "130 CLI-INTERRUPTED", id="F_WR_02_ctrl_c_in_the_trace"),
        pytest.param("ctrl_c_twice", "130 CLI-INTERRUPTED", id="F_WR_04_ctrl_c_twice"),
        pytest.param("sigterm", "143 CLI-TERMINATED", id="F_WR_03_sigterm"),
        pytest.param("sigterm_cold", "143 CLI-TERMINATED", id="F_WR_03_sigterm_in_the_trace"),
    ],
)
def test_signal(seen: dict[str, Any], name: str, end: str) -> None:
    found = answer(seen, name)
    assert set(found["states"]) <= WHOLE
    assert found["leftovers"] == {}
    assert set(found["ends"]) <= {"0", end}
    assert found["ends"].get(end, 0) > 0, "no export was hit at work: this proves nothing"
    assert found["slowest_seconds"] < MAX_SECONDS


def test_F_WR_01_kill(seen: dict[str, Any]) -> None:
    """Absent or whole; every round's next export succeeded and swept (`require_recovery`)."""
    found = answer(seen, "kill")
    assert set(found["states"]) <= WHOLE
    assert set(found["ends"]) <= {"-9 ?", "0"}
    assert found["leftovers"].get("stage", 0) > 0, "no export was hit with a stage open"


def test_F_WR_05_file_size_limit(seen: dict[str, Any]) -> None:
    found = answer(seen, "file_size_limit")["seen"]
    assert set(found) == {"fresh:absent:7 ENV-DISK:[]", "replace:old:7 ENV-DISK:[]"}


@pytest.mark.parametrize("name", ["race_fresh", "race_replace"])
def test_F_WR_08_three_exports_to_one_output(seen: dict[str, Any], name: str) -> None:
    found = answer(seen, name)
    assert found["bad"] == []
    assert name == "race_replace" or set(found["winners"]) == {"1"}


def test_F_WR_10_no_right_to_write(seen: dict[str, Any]) -> None:
    assert answer(seen, "as_nobody") == {
        "status": 7, "code": "ENV-PERMISSION", "state": "old", "leftovers": []
    }  # fmt: skip


# The work of a verb, replaced: Ctrl-C arrives while a weak reference calls back, where Python
# drops what is raised. Tracing a model is full of such places.
DROPPED = """
import os, signal, sys, time, weakref
from mla_deploy import machine
from mla_deploy.cli import main

class Thing: pass

def work(*_):
    thing = Thing()
    kept = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGINT))
    del thing
    time.sleep(60)
    return ()

machine.examine_machine = work
sys.exit(main(["doctor", "--json"]))
"""


# Ctrl-C arrives before the command line is read.
EARLY = """
import os, signal, sys
from mla_deploy.cli import entry

read = entry.group.make_context

def stopped(*given, **options):
    os.kill(os.getpid(), signal.SIGINT)
    return read(*given, **options)

entry.group.make_context = stopped
sys.exit(entry.main(["doctor", "--json"]))
"""


def test_F_WR_02_ctrl_c_before_the_flag_is_read_is_json_too() -> None:
    ran = run_child(EARLY)
    assert (ran.status, ran.object()["error"]["code"]) == (130, "CLI-INTERRUPTED")


def test_F_WR_02_ctrl_c_that_python_drops_is_raised_again() -> None:
    ran = run_child(DROPPED)
    assert (ran.status, ran.object()["error"]["code"]) == (130, "CLI-INTERRUPTED")
