"""The commands of docs/rewrite.md, run in order beside a graph that transformers exported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.e2e.conftest import Tell
from tests.e2e.pages import ROOT, commands_of

GRAPH = ROOT / "tests" / "foreign" / "stored" / "transformers-decode.onnx"


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path, told_by: Tell) -> None:
    shutil.copy(GRAPH, tmp_path / "model.onnx")
    commands = commands_of("rewrite.md")
    assert [command[1] for command in commands] == ["inspect", "rewrite", "validate"]
    told = [told_by(command, tmp_path) for command in commands]
    assert "history-expanded" in told[0] and "of cache a token" in told[1]
    assert "cases passed" in told[2]
    assert (tmp_path / "rewritten.explain.svg").read_text("utf-8").startswith("<svg")
