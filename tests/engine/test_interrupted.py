"""A build interrupted, killed, or not alone: the bundle stays whole, nothing is left over."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mla_deploy.bundle import open_bundle
from tests.engine.engine_bundle import write_engine_bundle
from tests.small_bundle import names_in
from tests.tensorrt_names import python_path

STAND_IN = Path(__file__).with_name("stand_in")
_PROGRAM = "import sys; from mla_deploy.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle whose `tensorrt` is the stand-in."""
    monkeypatch.setenv("PYTHONPATH", python_path(STAND_IN))
    monkeypatch.setenv("STAND_IN_RECORD", str(tmp_path / "record"))
    (tmp_path / "place").mkdir()
    write_engine_bundle(tmp_path / "place" / "b", target="jetson-orin-jp7", release="10.16")
    return tmp_path / "place" / "b"


def build(folder: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, "build", str(folder), *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def hanging(folder: Path, monkeypatch: pytest.MonkeyPatch) -> subprocess.Popen[str]:
    """A build in the middle of its first engine."""
    monkeypatch.setenv("STAND_IN_MODE", "hangs")
    child = build(folder)
    record = folder.parent.parent / "record"
    deadline = time.monotonic() + 60
    while not (record.exists() and "add_optimization_profile" in record.read_text()):
        assert child.poll() is None and time.monotonic() < deadline, child.communicate()
        time.sleep(0.02)
    return child


@pytest.mark.parametrize(
    ("number", "status", "code"),
    [(signal.SIGINT, 130, "CLI-INTERRUPTED"), (signal.SIGTERM, 143, "CLI-TERMINATED")],
)
def test_a_signal_leaves_the_bundle_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int, code: str
) -> None:
    child = hanging(folder, monkeypatch)
    assert len(names_in(folder.parent)) == 3  # the bundle, its lock, the stage
    started = time.monotonic()
    child.send_signal(number)
    _, err = child.communicate(timeout=30)
    assert time.monotonic() - started < 5
    assert (child.returncode, code in err) == (status, True), err
    assert names_in(folder.parent) == ["b"]
    assert open_bundle(folder).engine is None


def test_what_a_kill_leaves_is_swept_by_the_next_build(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = hanging(folder, monkeypatch)
    child.kill()
    child.communicate(timeout=30)
    assert open_bundle(folder).engine is None
    assert any(name.startswith(".b.partial-") for name in names_in(folder.parent))
    monkeypatch.setenv("STAND_IN_MODE", "builds")
    child = build(folder)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    assert "10.16.2.1" in out
    assert names_in(folder.parent) == ["b"]
    assert open_bundle(folder).engine is not None


def test_two_builds_of_one_bundle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = hanging(folder, monkeypatch)
    second = build(folder)
    _, err = second.communicate(timeout=60)
    first.kill()
    first.communicate(timeout=30)
    assert (second.returncode, "error[BUN-BUSY]" in err) == (8, True), err
