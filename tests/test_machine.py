"""`examine_machine` answers whatever the machine is like; every probe here meets a bad one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mla_deploy import machine
from mla_deploy.machine import Finding, examine_machine


def _found(findings: tuple[Finding, ...]) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


@pytest.fixture
def no_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Library imports in child processes take seconds; most tests do not need them."""
    monkeypatch.setattr(machine, "_import_finding", lambda name: Finding(name, "ok", "1.0"))


def _program(folder: Path, name: str, text: str) -> None:
    program = folder / name
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)


def test_this_machine_has_what_the_package_needs() -> None:
    steps: list[tuple[str, int, int]] = []
    found = _found(examine_machine(lambda *step: steps.append(step)))
    for library in ("torch", "transformers", "onnx", "onnxruntime", "safetensors", "tokenizers"):
        assert found[library].state == "ok", found[library]
    assert "CPUExecutionProvider" in found["ONNX Runtime providers"].facts["providers"]
    assert found["memory"].facts["total_bytes"] > 0
    assert found["processor"].facts["cores"] == len(os.sched_getaffinity(0))
    assert steps[-1][1] == steps[-1][2] == len(steps)


@pytest.mark.usefixtures("no_imports")
def test_a_gpu_is_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _program(tmp_path, "nvidia-smi", "echo 'NVIDIA H200, 9.0, 143771 MiB, 580.00'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    gpu = _found(examine_machine())["GPU"]
    assert (gpu.state, gpu.facts["gpus"]) == ("ok", ["NVIDIA H200, 9.0, 143771 MiB, 580.00"])


@pytest.mark.usefixtures("no_imports")
@pytest.mark.parametrize("text", ["echo 'driver mismatch' >&2; exit 9", "exit 0", "kill -9 $$"])
def test_a_gpu_tool_that_fails_is_broken_not_fatal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    _program(tmp_path, "nvidia-smi", text)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    gpu = _found(examine_machine())["GPU"]
    assert gpu.state == "broken"
    assert gpu.meaning


@pytest.mark.usefixtures("no_imports")
def test_no_gpu_and_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(machine, "_proc", lambda name: "")
    found = _found(examine_machine())
    assert found["GPU"].state == "absent"
    assert found["memory"].state == "broken"  # told, not raised
    assert found["processor"].state == "ok"


def test_a_library_that_aborts_the_process_is_broken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bodies = {"aborts": "import os; os.abort()", "raises": "raise RuntimeError('no libcuda')",
              "chatty": "print('hello'); __version__ = '3'"}  # fmt: skip
    for name, body in bodies.items():
        (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert machine._import_finding("aborts").state == "broken"
    told = machine._import_finding("raises")
    assert (told.state, told.found) == ("broken", "RuntimeError: no libcuda")
    assert machine._import_finding("chatty").found == "3"
    absent = machine._import_finding("no_such_library")
    assert (absent.state, bool(absent.meaning)) == ("absent", True)


def test_a_library_that_hangs_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: Any, **__: Any) -> None:
        raise subprocess.TimeoutExpired("python", 60)

    monkeypatch.setattr(machine.subprocess, "run", hang)
    assert machine._import_finding("torch").state == "broken"


def test_the_module_needs_no_library_of_ours() -> None:
    """So that `doctor` runs where the installation is broken."""
    code = (
        "import sys; from mla_deploy.machine import examine_machine\n"
        "print(*sorted({'torch', 'numpy', 'onnx', 'click', 'rich'} & {*sys.modules}))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == ""
