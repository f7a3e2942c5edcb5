"""docs/devices.md is current, and says of no device more than a test or a report shows."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from mla_deploy.bundle.manifest import is_intact
from mla_deploy.targets import TARGETS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def devices() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("devices", ROOT / "docs" / "devices.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setitem(sys.modules, "devices", module)  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    monkeypatch.undo()


def test_the_page_is_current(devices: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.PAGE.read_text("utf-8") == devices.page(), "run `python docs/devices.py`"
    lines = devices.page().splitlines()
    for target in TARGETS:
        rows = [line for line in lines if line.startswith(f"| {target.name} |")]
        assert len(rows) == (target.release is not None)


def test_what_is_claimed_has_tests_that_are_there(devices: ModuleType) -> None:
    for claim in devices.CLAIMS:
        assert claim.word in devices.WORDS
        assert claim.tests or claim.report or claim.word == "read", claim.what
        for test in claim.tests:
            path, _, name = test.partition("::")
            tree = ast.parse((ROOT / path).read_text("utf-8"))
            assert name in {getattr(node, "name", "") for node in tree.body}, test


def test_nothing_ran_that_no_report_shows(devices: ModuleType) -> None:
    reports = devices.device_reports()
    plugin = devices.plugin_reports()
    for claim in devices.CLAIMS:
        assert (claim.word == "ran") == bool(claim.report)
        assert not claim.report or plugin[claim.report].startswith("ran")
    assert set(plugin) <= {target.name for target in TARGETS}
    for name in reports:
        text = (devices.REPORTS / f"{name}.json").read_bytes()
        assert is_intact(text) and name in {target.name for target in TARGETS}
    rows = [line for line in devices.page().splitlines() if line.startswith("| ")]
    for row in rows:
        assert "supported" not in row


def test_a_report_changes_its_row(
    devices: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "REPORTS", tmp_path)
    assert "| jetson-orin-jp6 | TensorRT 10.3 | 8.7 |" in devices.page()
    assert "No engine has run yet" in devices.page()
    report = {"passed": True, "device": {"name": "Orin"}}
    (tmp_path / "jetson-orin-jp6.json").write_text(json.dumps(report))
    (row,) = [line for line in devices.page().splitlines() if "jetson-orin-jp6" in line]
    assert row.endswith("| Orin: passed |")
    assert "No engine has run" not in devices.page()


def test_a_plugin_report_of_another_source_says_so(
    devices: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "PLUGIN_REPORTS", tmp_path)
    for digest, passed, told in (
        (devices.source_digest(), True, "ran"), ("0" * 64, True, "ran, an older source"),
        (devices.source_digest(), False, "FAILED"),
    ):  # fmt: skip
        report = {"passed": passed, "source_sha256": digest}
        (tmp_path / "h200.json").write_text(json.dumps(report))
        assert devices.plugin_reports() == {"h200": told}
        (row,) = [line for line in devices.page().splitlines() if line.startswith("| h200 |")]
        assert f"| {told} |" in row
        assert ("ran on: h200." in devices.page()) == (told != "FAILED")
