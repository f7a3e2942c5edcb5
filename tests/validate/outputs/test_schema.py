"""The schema: what we write fits it and is all in it; what does not fit is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from mla_deploy.errors import IncompatibleError, InputError, MlaDeployError
from mla_deploy.validate.outputs import read_report, require_schema, write_json
from mla_deploy.validate.outputs.schema import SCHEMA_VERSION, report_schema

SCHEMA = report_schema()


def test_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["properties"]["schema_version"]["const"] == SCHEMA_VERSION


@pytest.mark.parametrize("kind", ["facts", "failed", "hostile", "full", "bare"])
def test_reports_fit(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    found = request.getfixturevalue(kind)
    write_json(found, tmp_path / "report.json")
    assert read_report(tmp_path / "report.json") == json.loads(json.dumps(found))


def test_every_key_of_ours_is_declared(facts: dict[str, Any]) -> None:
    assert list(_undeclared(facts, SCHEMA, "$")) == []
    assert list(_undeclared({**facts, "odd": 1}, SCHEMA, "$")) == ["$.odd"]


def _undeclared(value: Any, schema: dict[str, Any], place: str) -> Iterator[str]:
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
    if isinstance(value, dict) and "properties" in schema:
        for key, inner in value.items():
            if key not in schema["properties"]:
                yield f"{place}.{key}"
            else:
                yield from _undeclared(inner, schema["properties"][key], f"{place}.{key}")
    for item in value if isinstance(value, list) else ():
        yield from _undeclared(item, schema["items"], f"{place}[]")


def test_what_validate_prints_is_taken_too(facts: dict[str, Any], tmp_path: Path) -> None:
    passed = {"ok": True, "result": facts, "tool": {}}
    refused = {"ok": False, "error": {"code": "VAL-GATE", "details": {"report": facts}}}
    for printed in (passed, refused):
        (tmp_path / "out.json").write_text(json.dumps(printed))
        assert read_report(tmp_path / "out.json")["bundle_digest"] == facts["bundle_digest"]


def _without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda facts: {name: value for name, value in facts.items() if name != key}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda facts: {**facts, "schema_version": SCHEMA_VERSION + 1}, "REP-VERSION"),
        (lambda facts: {**facts, "schema_version": "1"}, "REP-VERSION"),
        (lambda facts: {**facts, "schema_version": True}, "REP-VERSION"),
        (_without("schema_version"), "REP-FORM"),
        (_without("cases"), "REP-FORM"),
        (lambda facts: {**facts, "cases": [{"name": "x"}]}, "REP-FORM"),
        (lambda facts: {**facts, "passed": "yes"}, "REP-FORM"),
        (lambda facts: {**facts, "seconds": -1}, "REP-FORM"),
        (lambda facts: {**facts, "speed": {**facts["speed"], "points": []}}, "REP-FORM"),
        (lambda facts: {**facts, "memory": {**facts["memory"], "capacity_tokens": 0}}, "REP-FORM"),
        (lambda facts: {"ok": False, "error": {"details": {}}}, "REP-FORM"),
        (lambda facts: {"ok": True, "result": {"text": "of another verb"}}, "REP-FORM"),
        (lambda facts: [facts], "REP-FORM"),
    ],
)
def test_no_report_or_another_version(
    facts: dict[str, Any], tmp_path: Path, change: Callable[[Any], Any], code: str
) -> None:
    (tmp_path / "report.json").write_text(json.dumps(change(facts)))
    with pytest.raises(MlaDeployError) as refused:
        read_report(tmp_path / "report.json")
    assert refused.value.code == code
    wanted = IncompatibleError if code == "REP-VERSION" else InputError
    assert type(refused.value) is wanted
    assert refused.value.hint


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b"", "REP-FORM"),
        (b"{", "REP-FORM"),
        (b'{"schema_version": 1, "schema_version": 1}', "REP-FORM"),
        (b'{"schema_version": NaN}', "REP-FORM"),
        (b"\xff\xfe", "REP-FORM"),
        (b"<!doctype html>", "REP-FORM"),
        (b"[" * 10_000, "REP-FORM"),
    ],
)
def test_damaged_json(tmp_path: Path, text: bytes, code: str) -> None:
    (tmp_path / "report.json").write_bytes(text)
    with pytest.raises(InputError, match=code):
        read_report(tmp_path / "report.json")


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="FILE-MISSING"):
        read_report(tmp_path / "report.json")
    with pytest.raises(InputError, match="FILE-TYPE"):
        read_report(tmp_path)


def test_every_cut_of_a_report_is_refused(facts: dict[str, Any], tmp_path: Path) -> None:
    """A half-written file is never taken for a report."""
    text = json.dumps(facts).encode()
    for length in range(0, len(text), len(text) // 40):
        (tmp_path / "report.json").write_bytes(text[:length])
        with pytest.raises(InputError, match="REP-FORM"):
            read_report(tmp_path / "report.json")


def test_what_is_allowed_stays_allowed(facts: dict[str, Any]) -> None:
    """A later release may add keys within a version."""
    assert require_schema({**facts, "new_part": {"any": 1}})["new_part"] == {"any": 1}
