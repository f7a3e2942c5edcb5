"""`mla-deploy report` and the files of `validate`: what is written, printed and refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from mla_deploy import validate
from mla_deploy.validate import Call, Case, write_json
from mla_deploy.validate.outputs.schema import report_schema
from tests.cli.conftest import Command
from tests.exported import Exported, exported


@pytest.fixture(scope="module")
def made() -> Exported:
    return exported()


@pytest.fixture(scope="module")
def _found(made: Exported) -> dict[str, Any]:
    cases = (Case("one", (Call(((5, 8, 2),)),)),)
    return validate(made.bundle, source=made.checkpoint, cases=cases, threads=1).to_dict()


@pytest.fixture
def report(_found: dict[str, Any], tmp_path: Path) -> Path:
    write_json(_found, tmp_path / "report.json")
    return tmp_path / "report.json"


def test_shown_as_validate_shows_it(command: Command, report: Path) -> None:
    ran = command("report", report)
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.splitlines()[0].startswith(f"{report}: equal to its source (fp32): 1 of 1 cases")
    assert "Memory, in bytes" in ran.out


def test_rendered_in_every_form(command: Command, report: Path, tmp_path: Path) -> None:
    place = tmp_path / "out"
    place.mkdir()
    ran = command("report", report, "--out", place / "a.html", "--out", place / "b.json",
                  "--markdown", place / "comment", "--junit", place / "j.xml",
                  "--html", place / "c.htm", "--json")  # fmt: skip
    told = ran.object("report")["result"]
    assert len(told["written"]) == 5
    starts = {path.name: path.read_text()[:9] for path in place.iterdir()}
    assert starts == {"a.html": "<!doctype", "b.json": '{\n  "sche', "comment": "### \u2705 mla",
                      "j.xml": "<?xml ver", "c.htm": "<!doctype"}  # fmt: skip
    assert json.loads((place / "b.json").read_text()) == told["report"]


def test_a_verdict_of_no_is_shown_too(
    command: Command, _found: dict[str, Any], tmp_path: Path
) -> None:
    """Exit 0: the verdict was reached before."""
    facts = copy.deepcopy(_found)
    facts["cases"][0] |= {"passed": False, "failures": ["no"], "logits": None, "cache": None}
    write_json({**facts, "passed": False}, tmp_path / "report.json")
    ran = command("report", tmp_path / "report.json")
    assert ran.status == 0
    assert "NOT equal to its source" in ran.out.splitlines()[0]
    assert "FAILED" in ran.out


def test_the_least_report_there_can_be(
    command: Command, _found: dict[str, Any], tmp_path: Path
) -> None:
    least = {name: _found[name] for name in report_schema()["required"]}
    (tmp_path / "report.json").write_text(json.dumps(least))
    for form in ("a.html", "a.md", "a.xml", "a.json"):
        ran = command("report", tmp_path / "report.json", "--out", tmp_path / form)
        assert (ran.status, ran.err) == (0, "")


@pytest.mark.parametrize(
    ("text", "status", "code"),
    [
        ("{", 4, "REP-FORM"),
        ('{"schema_version": 1}', 4, "REP-FORM"),
        ('{"schema_version": 2}', 6, "REP-VERSION"),
        (None, 4, "FILE-MISSING"),
    ],
)
def test_what_is_no_report(
    command: Command, tmp_path: Path, text: str | None, status: int, code: str
) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    ran = command("report", tmp_path / "report.json", "--out", tmp_path / "a.html", "--json")
    assert (ran.status, ran.object()["error"]["code"]) == (status, code)
    assert not (tmp_path / "a.html").exists()


@pytest.mark.parametrize(
    ("name", "code"),
    [("a.pdf", "REP-SUFFIX"), ("missing/a.html", "FILE-MISSING"), (".", "REP-SUFFIX"),
     ("folder.md", "FILE-TYPE")],
)  # fmt: skip
def test_validate_refuses_a_place_before_it_runs(
    command: Command, tmp_path: Path, name: str, code: str
) -> None:
    """The bundle is not even opened: there is none."""
    (tmp_path / "folder.md").mkdir()
    ran = command("validate", tmp_path / "none", "--source", tmp_path, "--report",
                  tmp_path / name, "--json")  # fmt: skip
    assert (ran.status, ran.object()["error"]["code"]) == (4, code)


def test_validate_writes_each_form_that_is_asked_for(
    command: Command, made: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mla_deploy.validate import held_source

    few = (Case("one", (Call(((5, 8, 2),)),)),)
    monkeypatch.setattr(held_source, "chosen_cases", lambda *_, **__: few)
    places = [tmp_path / f"report.{suffix}" for suffix in ("json", "md", "html")]
    asked = [word for place in places for word in ("--report", place)]
    ran = command("validate", made.bundle.path, "--source", made.checkpoint, "--threads", 1,
                  *asked, "--junit", tmp_path / "report.xml")  # fmt: skip
    assert (ran.status, ran.err) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report.html", "report.json", "report.md", "report.xml",
    ]  # fmt: skip
    assert json.loads(places[0].read_text())["speed"]["points"]


def test_reports_are_not_of_engines(command: Command, tmp_path: Path) -> None:
    ran = command("validate", tmp_path, "--engine", "--report", tmp_path / "a.json", "--json")
    assert (ran.status, ran.object()["error"]["code"]) == (2, "CLI-USAGE")
