"""`mla-deploy export --in-place` as a user types it: what it refuses, and what it then leaves."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from mla_deploy import export, open_bundle
from mla_deploy.errors import InputError
from mla_deploy.export import in_place
from tests.checkpoint.edits import WEIGHTS
from tests.cli.conftest import Command, Ran
from tests.faults.conftest import listing
from tests.tiny import write_tiny


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "place" / "model", "youtu", dtype="bfloat16")


def refused(command: Command, model: Path, code: str, *options: object, status: int = 4) -> Ran:
    before = listing(model.parent)
    ran = command("export", model, "--in-place", "--json", *options)
    assert ran.status == status
    error = ran.object()["error"]
    assert error["code"] == code, error
    assert listing(model.parent) == before
    return ran


def message(ran: Ran) -> str:
    error: dict[str, Any] = ran.object()["error"]
    return str(error["message"]) + str(error["hint"])


def test_another_dtype_than_the_weights_have(command: Command, model: Path, untraced: None) -> None:
    told = message(refused(command, model, "EXP-IN-PLACE", "--dtype", "fp32"))
    assert "fp32" in told
    assert "bf16" in told
    assert "--out" in told


def test_links_of_the_hugging_face_cache(command: Command, model: Path, untraced: None) -> None:
    """ONNX refuses weights behind links, so what a download leaves is no place for a bundle."""
    blobs = model.parent / "models--x" / "blobs"
    snapshot = blobs.parent / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in model.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    export_ran = refused(command, snapshot, "EXP-IN-PLACE")
    assert WEIGHTS in message(export_ran)
    assert "--out" in message(export_ran)


def test_a_hard_link(command: Command, model: Path, untraced: None) -> None:
    os.link(model / WEIGHTS, model.parent / "elsewhere")
    assert "2 hard links" in message(refused(command, model, "EXP-IN-PLACE"))


def test_a_text_that_is_a_link(command: Command, model: Path) -> None:
    """The bundle needs it, and would refuse to read it."""
    (model / "config.json").rename(model / "real.json")
    (model / "config.json").symlink_to("real.json")
    assert "config.json" in message(refused(command, model, "EXP-IN-PLACE"))


def test_more_files_than_a_bundle_may_name(
    model: Path, untraced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_place, "_MAX_FILES", 0)
    with pytest.raises(InputError) as caught:
        export(model, in_place=True)
    assert caught.value.code == "EXP-IN-PLACE"


@pytest.mark.parametrize("options", [("--out", "x", "--in-place"), ()])
def test_one_place_and_no_more(command: Command, model: Path, options: tuple[str, ...]) -> None:
    ran = command("export", model, *options, "--json")
    assert (ran.status, ran.object()["error"]["code"]) == (2, "CLI-USAGE")


def test_one_place_and_no_more_by_call(model: Path) -> None:
    for arguments in ((), (model.parent / "out",)):
        with pytest.raises(InputError) as caught:
            export(model, *arguments, in_place=bool(arguments))
        assert caught.value.code == "EXP-OPTION"


def test_from_the_first_export_to_inspect(command: Command, model: Path) -> None:
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    first = command("export", model, "--in-place", "--json").object("export")["result"]
    assert first["dtype"] == "bf16"
    refused(command, model, "BUN-EXISTS", status=8)
    again = command("export", model, "--in-place", "--replace", "--capacity", "64", "--json")
    assert again.object("export")["result"]["cache"]["capacity"] == 64
    shown = command("inspect", model, "--json").object("inspect")["result"]
    assert (shown["kind"], shown["verified"]) == ("bundle", "headers")
    assert shown["predicted"]["weight_bytes"] == open_bundle(model).kept_bytes + 4096
    assert {name: (model / name).read_bytes() for name in before} == before


def test_weights_that_vanish_during_the_export(model: Path) -> None:
    before = set(listing(model))

    def report(stage: str, _done: int, _total: int) -> None:
        if stage == "rewrite":
            os.truncate(model / WEIGHTS, 9000)

    with pytest.raises(InputError) as caught:
        export(model, in_place=True, progress=report)
    assert caught.value.code == "CKPT-TRUNCATED"
    assert set(listing(model)) == before


def test_no_room_for_what_must_be_written(
    model: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    """Known once the weights are laid out, so told before the first of them is read."""
    from mla_deploy.bundle.filesystem import FileSystem

    wanted = 4096 * 11 // 10 + (64 << 20)  # two layers' halves, and what is spared
    monkeypatch.setattr(FileSystem, "free_bytes", lambda fs, folder: wanted - 1)
    ran = refused(command, model, "ENV-DISK", status=7)
    assert ran.object()["error"]["details"]["wanted"] == wanted


def test_json_of_the_manifest_is_what_a_reader_shows(command: Command, model: Path) -> None:
    command("export", model, "--in-place")
    told = json.loads((model / "mla-deploy.manifest.json").read_text())
    assert told["in_place"]["verified"] == dict(open_bundle(model).manifest["in_place"]["verified"])
