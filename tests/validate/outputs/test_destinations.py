"""Where a report goes: by suffix, in one step, and refused before the work where it cannot."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mla_deploy.errors import EnvironmentFailure, InputError, MlaDeployError
from mla_deploy.validate.outputs import SUFFIXES, check_destination, write_report


@pytest.mark.parametrize(
    ("name", "start"),
    [("a.json", b"{"), ("a.xml", b"<?xml"), ("a.md", b"### "), ("A.HTML", b"<!doctype html>")],
)
def test_suffix_says_the_form(
    facts: dict[str, Any], tmp_path: Path, name: str, start: bytes
) -> None:
    assert {Path(each).suffix for each in ("a.json", "a.xml", "a.md", "a.html")} == set(SUFFIXES)
    (tmp_path / name).write_text("what stood there before")
    check_destination(tmp_path / name)
    write_report(facts, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("report", "REP-SUFFIX"),
        ("report.pdf", "REP-SUFFIX"),
        ("missing/report.json", "FILE-MISSING"),
        ("folder.json", "FILE-TYPE"),
        ("fifo.json", "FILE-TYPE"),
        ("nul\0.json", "FILE-NAME"),
    ],
)
def test_refused_before_and_at_the_write(
    facts: dict[str, Any], tmp_path: Path, name: str, code: str
) -> None:
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "fifo.json")
    for call in (check_destination, lambda place: write_report(facts, place)):
        with pytest.raises(InputError, match=code):
            call(f"{tmp_path}/{name}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo.json", "folder.json"]


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """root may write anywhere, so the system's answer is given here."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(EnvironmentFailure, match="FILE-PERMISSION"):
        check_destination(tmp_path / "report.html")


def test_what_stood_there_stays_when_the_write_fails(
    facts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "report.json").write_text("before")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(EnvironmentFailure, match=r"ENV-DISK.*No space"):
        write_report(facts, tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_report_is_taken_as_it_is_or_as_its_dictionary(
    facts: dict[str, Any], tmp_path: Path
) -> None:
    class Told:
        def to_dict(self) -> dict[str, Any]:
            return facts

    for index, report in enumerate((facts, Told())):
        write_report(report, tmp_path / f"{index}.json")
        assert json.loads((tmp_path / f"{index}.json").read_text()) == facts


def test_refusals_have_a_hint(tmp_path: Path) -> None:
    with pytest.raises(MlaDeployError) as refused:
        check_destination(tmp_path / "report.docx")
    assert "JUnit XML" in refused.value.hint
