"""`mla-deploy doctor`: the summary, the table, the JSON form; it never fails."""

from __future__ import annotations

from typing import Any

import pytest

from mla_deploy import machine
from mla_deploy.machine import Finding

from .conftest import Command

FINDINGS = (
    Finding("torch", "ok", "2.13.0", facts={"version": "2.13.0"}),
    Finding("tensorrt", "absent", "not installed", "no TensorRT engines"),
    Finding("GPU", "broken", "driver mismatch", "the cpu target is what runs here"),
)


def test_doctor_tells_what_each_absence_means(command: Command, monkeypatch: Any) -> None:
    monkeypatch.setattr(machine, "examine_machine", lambda *_: FINDINGS)
    ran = command("doctor")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.splitlines()[0] == "this machine: 1 ok; absent: tensorrt; broken: GPU"
    assert "not installed: no TensorRT engines" in ran.out
    assert "BROKEN" in ran.out


def test_doctor_json_is_whole(command: Command, monkeypatch: Any) -> None:
    monkeypatch.setattr(machine, "examine_machine", lambda *_: FINDINGS)
    found = command("doctor", "--json").object("doctor")["result"]["findings"]
    assert [entry["what"] for entry in found] == ["torch", "tensorrt", "GPU"]
    assert found[0]["facts"] == {"version": "2.13.0"}


@pytest.mark.parametrize("columns", [40, 80, 160])
def test_tables_fit_the_terminal(command: Command, monkeypatch: Any, columns: int) -> None:
    long = Finding("processor", "ok", "a very long name of a processor " * 4)
    monkeypatch.setattr(machine, "examine_machine", lambda *_: (*FINDINGS, long))
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = command("doctor").out.splitlines()[1:]
    assert lines and max(len(line) for line in lines) <= columns
    assert "\x1b" not in "".join(lines)  # no colour when nobody's terminal reads it
