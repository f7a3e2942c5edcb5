"""`mla-deploy build`: tables, the JSON form, --dry-run, and refusals with their exit status."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from mla_deploy.engine import pipeline
from tests.cli.conftest import Command
from tests.engine.engine_bundle import write_engine_bundle
from tests.engine.small_graphs import decode_layer, node
from tests.small_bundle import names_in, write_bundle

real = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)


@real
def test_engines_are_built_and_told(command: Command, tmp_path: Path) -> None:
    write_engine_bundle(tmp_path / "b")
    ran = command("build", tmp_path / "b", "--profile", "decode:batch=1..2")
    assert (ran.status, ran.err) == (0, "")
    first, *rest = ran.out.splitlines()
    assert "for rtx-40 (SM 8.9)" in first and first.endswith("audit passed; not run on a GPU")
    text = "\n".join(rest)
    assert "decode:batch=1..2" in text and "cache_copies" in text and "new_lengths" in text
    ran = command("build", tmp_path / "b")
    assert ran.status == 8 and "error[BUN-EXISTS]" in ran.err and "--replace" in ran.err
    result = command("build", tmp_path / "b", "--replace", "--json").object("build")["result"]
    assert result["dry_run"] is False
    assert [graph["graph"] for graph in result["report"]["graphs"]] == ["prefill", "decode"]
    assert all(line["passed"] for line in result["audit"])
    inspected = command("inspect", tmp_path / "b", "--json").object("inspect")["result"]
    assert inspected["digest"] == result["digest"]
    assert inspected["engine"] == {
        "digest": result["engine_digest"],
        "release": "rtx-1.7",
        "sms": ["8.9"],
        "runtime": result["report"]["package"] + " " + result["report"]["version"],
        "files": {f"{g['graph']}.plan": g["plan_bytes"] for g in result["report"]["graphs"]},
    }
    assert "Engines" in command("inspect", tmp_path / "b").out


def test_dry_run_needs_no_tensorrt(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.importlib.util, "find_spec", lambda name: None)
    write_engine_bundle(tmp_path / "b", target="h100", release="11")
    ran = command("build", tmp_path / "b", "--dry-run")
    assert (ran.status, ran.err) == (0, "")
    assert "would build for h100 with tensorrt, 1.0 GiB of host memory at most" in ran.out
    assert "builds only there" in " ".join(ran.out.split())
    result = command("build", tmp_path / "b", "--dry-run", "--json").object("build")["result"]
    assert result["dry_run"] is True and result["builds_here"] is False
    assert "engine" not in names_in(tmp_path / "b")
    ran = command("build", tmp_path / "b")
    assert ran.status == 7 and "error[BLD-RUNTIME]" in ran.err and "--package" in ran.err


def test_dry_run_lints(command: Command, tmp_path: Path) -> None:
    made = decode_layer()
    made.graph.node.append(node("BitwiseNot", ["new_lengths"], ["flipped"], name="bits"))
    write_engine_bundle(tmp_path / "b", made)
    ran = command("build", tmp_path / "b", "--dry-run")
    assert ran.status == 4 and "error[BLD-LINT]" in ran.err
    assert "What the linter refuses" in ran.out and "bits (BitwiseNot)" in ran.out
    error = command("build", tmp_path / "b", "--dry-run", "--json").object()["error"]
    assert error["details"]["findings"][0]["check"] == "operator"


@pytest.mark.parametrize(
    ("options", "status", "code"),
    [
        (("--profile", "decode:batch=8..1"), 4, "BLD-PROFILE"),
        (("--profile", "decode:batch=1,capacity=128"), 4, "BLD-PROFILE"),
        (("--sm", "9.0"), 4, "BLD-SM"),
        (("--plugin", "on"), 4, "BLD-PLUGIN"),
        (("--plugin", "maybe"), 2, "CLI-USAGE"),
        (("--timeout", "0"), 2, "CLI-USAGE"),
    ],
)
def test_refusals(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...],
    status: int, code: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(pipeline, "_missing", lambda *_: "")
    write_engine_bundle(tmp_path / "b")
    ran = command("build", tmp_path / "b", *options)
    assert (ran.status, ran.out) == (status, "")
    assert f"error[{code}]: " in ran.err and "hint: " in ran.err
    error = command("build", tmp_path / "b", *options, "--json").object()["error"]
    assert error["code"] == code
    assert "engine" not in names_in(tmp_path / "b")


def test_a_bundle_for_the_cpu(command: Command, tmp_path: Path) -> None:
    write_bundle(tmp_path / "b")
    ran = command("build", tmp_path / "b")
    assert ran.status == 4 and "error[BLD-TARGET]" in ran.err
