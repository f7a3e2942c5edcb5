"""What `doctor` says of a Jetson, of a driver without nvidia-smi, of swap, and of none of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mla_deploy import jetson, machine
from mla_deploy.jetson import jetson_probes
from mla_deploy.machine import Finding

_R36 = (
    "# R36 (release), REVISION: 4.0, GCID: 37537400, BOARD: generic, EABI: aarch64, DATE: Fri\n"
    "# KERNEL_VARIANT: oot\n"
)


def found(monkeypatch: pytest.MonkeyPatch, text: str) -> dict[str, Finding]:
    monkeypatch.setattr(jetson, "system_file", lambda path: text)
    return {what: probe() for what, probe in jetson_probes()}


@pytest.mark.parametrize(
    ("text", "said", "tensorrt"),
    [(_R36, "L4T 36.4.0, JetPack 6", "10.3"),
     (_R36.replace("R36", "R38").replace("4.0", "2.1"), "L4T 38.2.1, JetPack 7.0 or 7.1", "10.13"),
     (_R36.replace("R36", "R39").replace("4.0", "2.0"), "L4T 39.2.0, JetPack 7.2", "10.16"),
     (_R36.replace("R36", "R35"), "L4T 35.4.0", None)],
)  # fmt: skip
def test_jetpacks(
    monkeypatch: pytest.MonkeyPatch, text: str, said: str, tensorrt: str | None
) -> None:
    jetpack = found(monkeypatch, text)["JetPack"]
    assert (jetpack.state, jetpack.found, jetpack.facts["tensorrt"]) == ("ok", said, tensorrt)


def test_no_jetson(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(monkeypatch, "") == {}


def test_a_release_file_that_says_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(monkeypatch, "hello\n")["JetPack"].state == "broken"


@pytest.mark.parametrize(
    ("program", "state", "said"),
    [("echo 'NV Power Mode: MAXN'; echo 0", "ok", "NV Power Mode: MAXN 0"),
     ("echo no >&2; exit 1", "broken", "no"), (None, "absent", "nvpmodel not found")],
)  # fmt: skip
def test_power_mode(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str | None, state: str, said: str
) -> None:
    if program is not None:
        (tmp_path / "nvpmodel").write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / "nvpmodel").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    mode = found(monkeypatch, _R36)["power mode"]
    assert (mode.state, mode.found) == (state, said)


def test_a_driver_without_its_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    version = "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build\n"
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(machine, "_proc", lambda name: version if "nvidia" in name else "")
    gpu = machine._gpu()
    assert (gpu.state, gpu.facts["driver"]) == ("ok", "540.4.0")
    monkeypatch.setattr(machine, "_proc", lambda name: "")
    assert machine._gpu().state == "absent"


def test_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_proc", lambda _: "SwapTotal: 4194304 kB\nSwapFree: 2097152 kB\n")
    assert machine._swap().found == "2.0 GiB free of 4.0 GiB"
    monkeypatch.setattr(machine, "_proc", lambda _: "SwapTotal: 0 kB\nSwapFree: 0 kB\n")
    assert (machine._swap().state, bool(machine._swap().meaning)) == ("absent", True)


def test_memory_that_is_left_counts_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal: 100 kB\nMemAvailable: 64 kB\n",
        "/sys/fs/cgroup/memory.max": "40960\n",
        "/sys/fs/cgroup/memory.current": "8192\n",
    }
    monkeypatch.setattr(machine, "system_file", lambda path: files.get(path, ""))
    assert machine.available_bytes() == 40960 - 8192
    # Files that were read can be dropped again.
    files["/sys/fs/cgroup/memory.stat"] = "anon 5\ninactive_file 2048\nactive_file 1024\n"
    assert machine.available_bytes() == 40960 - 8192 + 3072
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert machine.available_bytes() == 64 * 1024
    first = "/sys/fs/cgroup/memory/memory."  # control groups of the first version
    files |= {f"{first}limit_in_bytes": "30000\n", f"{first}usage_in_bytes": "20000\n"}
    assert machine.available_bytes() == 10000
    files[f"{first}stat"] = "inactive_file 7\ntotal_inactive_file 4000\n"
    assert machine.available_bytes() == 14000
    files[f"{first}limit_in_bytes"] = "9223372036854771712\n"
    assert machine.available_bytes() == 64 * 1024
    files.clear()
    assert machine.available_bytes() is None
    assert machine.peak_bytes() == 0
    files["/proc/self/status"] = "Name: x\nVmHWM:     2048 kB\n"
    assert machine.peak_bytes() == 2048 * 1024
