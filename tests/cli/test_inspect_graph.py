"""`mla-deploy inspect` of an ONNX graph, as a person and as a program see it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.foreign.sources import write_source
from tests.foreign.stored import stored_graph
from tests.foreign.written import written_graph


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """mobius's graph, alone in its folder."""
    return Path(shutil.copy(stored_graph("mobius").path, tmp_path / "model.onnx"))


def test_tables_for_people(command: Command, graph: Path) -> None:
    ran = command("inspect", graph)
    assert ran.status == 0
    first = ran.out.splitlines()[0]
    assert "2 of 2 attentions are MLA" in first and "3 known faults" in first
    assert "cache-expanded" in ran.out and "past_key_values.1.key" in ran.out


def test_one_object_for_programs(command: Command, graph: Path, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "v3-yarn")
    ran = command("inspect", graph, "--json", "--config", source / "config.json")
    found = ran.object("inspect")["result"]
    assert found["is_mla"] and found["cache"] == "expanded"
    checks = [fault["check"] for fault in found["faults"]]
    assert checks == ["scale-without-mscale", "cache-expanded", "attention-outputs"]


def test_where_the_recognition_stopped_is_shown(command: Command, tmp_path: Path) -> None:
    ran = command("inspect", written_graph(tmp_path, "halves", mask="missing").path)
    assert ran.status == 0
    assert "0 of 2 attentions are MLA" in ran.out and "mask-dropped" in ran.out
    assert "first node that does not fit" in ran.out


def test_a_file_that_is_no_graph_is_refused(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no graph")
    assert command("inspect", path, "--json").object()["error"]["code"].startswith("ONNX-")


def test_a_graph_of_a_bundle_is_told_as_such(command: Command, graph: Path) -> None:
    bundle = graph.parent / "bundle"
    assert command("rewrite", graph, "--out", bundle).status == 0
    ran = command("inspect", bundle / "decode.onnx")
    assert ran.status == 0 and "not recognised" in ran.out.splitlines()[0]
    assert "inspect the folder that it is in" in " ".join(ran.out.split())
