"""`mla-deploy rewrite --explain`: a picture, its numbers, and an SVG beside the bundle."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.foreign.stored import stored_graph


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copy(stored_graph("mobius-youtu").path, tmp_path / "model.onnx"))


def test_the_picture_and_the_file(command: Command, model: Path) -> None:
    out = model.parent / "bundle"
    ran = command("rewrite", model, "--out", out, "--explain", "--context", 1000)
    assert ran.status == 0
    assert "as exported" in ran.out and "a step at 1,000 tokens" in ran.out
    svg = model.parent / "bundle.explain.svg"
    assert svg.read_text().startswith("<svg") and svg.name in "".join(ran.out.split())
    again = command("rewrite", model, "--out", out, "--replace", "--explain", "--json")
    explained = again.object("rewrite")["result"]["explain"]
    assert explained["context"] == 4096 and explained["svg"] == str(svg)
    before, after = explained["before"], explained["after"]
    assert before["cache_bytes"] == 4 * (24 + 12) * 4 and after["cache_bytes"] == 28 * 4


def test_a_wrong_context_is_refused_before_anything_is_written(
    command: Command, model: Path
) -> None:
    out = model.parent / "bundle"
    ran = command("rewrite", model, "--out", out, "--explain", "--context", 0, "--json")
    assert ran.object()["error"]["code"] == "EXP-CONTEXT"
    assert command("rewrite", model, "--out", out, "--context", 8).status == 2
    assert not out.exists()
