"""Where a bundle may be written, what stands there already, and a disk that is or becomes full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mla_deploy import export, open_bundle
from mla_deploy.bundle.filesystem import FileSystem
from tests.checkpoint.edits import edit_weights
from tests.cli.conftest import Command
from tests.faults.conftest import Refuses, listing
from tests.tiny import write_tiny

NORM = "model.norm.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "place" / "model", "youtu")


def contents(folder: Path) -> dict[str, Any]:
    """Every file beneath `folder`, byte for byte."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


# ------------------------------------------------------------------ 10: where


@pytest.mark.parametrize("out", ["model", "model/bundle", "model/sub/../bundle", "link/bundle"])
def test_F_WR_10_output_and_checkpoint_overlap(
    model: Path, refuses: Refuses, untraced: None, out: str
) -> None:
    (model / "sub").mkdir()
    (model.parent / "link").symlink_to("model")
    refuses(model, "BUN-OVERLAP", str(model), out=f"{model.parent}/{out}")


def test_F_WR_10_checkpoint_inside_the_output(
    model: Path, refuses: Refuses, untraced: None
) -> None:
    refuses(model, "BUN-OVERLAP", out=model.parent, options=("--replace",))


@pytest.mark.parametrize(
    ("out", "code", "named"),
    [
        ("none/bundle", "BUN-PARENT", "none"),
        ("a" * 201, "BUN-OUT", "200 bytes"),
        ("model/config.json/bundle", "BUN-PARENT", "config.json"),
    ],
)
def test_F_WR_10_no_such_place(
    model: Path, refuses: Refuses, untraced: None, out: str, code: str, named: str
) -> None:
    refuses(model, code, named, out=model.parent / out)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 40 KiB, less than a bundle."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40k", "none", str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_F_WR_10_read_only_disk(
    model: Path, refuses: Refuses, untraced: None, small_disk: Path
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    refuses(model, "ENV-PERMISSION", str(small_disk), out=small_disk / "bundle", exit_status=7)


def test_F_WR_10_read_only_folder(model: Path, refuses: Refuses, untraced: None) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere; a read-only disk is tried above")
    place = model.parent / "read-only"
    place.mkdir(mode=0o555)
    refuses(model, "ENV-PERMISSION", str(place), out=place / "bundle", exit_status=7)


# ------------------------------------------------------------------ 09: what stands there


@pytest.mark.parametrize("what", ["bundle", "folder", "file", "link", "link to nothing"])
@pytest.mark.parametrize("options", [(), ("--replace",)], ids=["", "replace"])
def test_F_WR_09_what_stands_at_the_output(
    model: Path, refuses: Refuses, what: str, options: tuple[str, ...]
) -> None:
    """Untouched without --replace; with it only a bundle is replaced, and no other thing."""
    out = model.parent / "bundle"
    if what == "bundle":
        export(model, out, dtype="bf16")
    elif what == "folder":
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
    elif what == "file":
        out.write_text("mine")
    else:
        out.symlink_to("model" if what == "link" else "nothing")
    before = contents(model.parent)
    if what == "bundle" and options:
        replaced = export(model, out, replace=True)
        assert open_bundle(out).digest == replaced.digest
        assert replaced.manifest["dtype"] == "fp32"
        assert set(contents(model.parent)) == set(before)
        return
    overlap = what == "link"  # the link leads to the checkpoint itself
    refuses(
        model, "BUN-OVERLAP" if overlap else "BUN-EXISTS", str(out), options=options, out=out,
        exit_status=4 if overlap else 8,
    )  # fmt: skip
    assert contents(model.parent) == before


def test_F_WR_09_a_failed_replacement_keeps_the_old_bundle(model: Path, refuses: Refuses) -> None:
    out = model.parent / "bundle"
    old = export(model, out)
    kept = contents(out)
    edit_weights(model, lambda tensors: tensors[NORM].fill_(float("nan")))
    refuses(model, "CKPT-NONFINITE", NORM, options=("--replace",), out=out)
    assert contents(out) == kept
    assert open_bundle(out).digest == old.digest


# ------------------------------------------------------------------ 06: a full disk


def test_F_WR_06_too_little_room_is_told_before_the_trace(
    model: Path, refuses: Refuses, untraced: None, small_disk: Path
) -> None:
    error = refuses(model, "ENV-DISK", str(small_disk), out=small_disk / "bundle", exit_status=7)
    assert error["details"]["wanted"] > error["details"]["found"]
    assert listing(small_disk) == {}


@pytest.mark.parametrize("kib", [4, 40, 120, 200], ids="{}_KiB".format)
def test_F_WR_06_the_disk_fills_during_the_export(
    model: Path, refuses: Refuses, small_disk: Path, monkeypatch: pytest.MonkeyPatch, kib: int
) -> None:
    """Room when it was asked about, none when the bytes come: as beside another big writer."""
    subprocess.run(["mount", "-o", f"remount,size={kib}k", str(small_disk)], check=True)
    monkeypatch.setattr(FileSystem, "free_bytes", lambda *_: 1 << 40)
    refuses(
        model, "ENV-DISK", str(small_disk), "nothing was left behind",
        out=small_disk / "bundle", exit_status=7, seconds=30,
    )  # fmt: skip
    assert listing(small_disk) == {}


def test_the_bundle_is_whole_where_nothing_goes_wrong(model: Path, command: Command) -> None:
    """The other tests' control: same checkpoint, same command."""
    out = model.parent / "bundle"
    ran = command("export", model, "--out", out, "--json")
    result = ran.object("export")["result"]
    assert (ran.status, result["digest"]) == (0, open_bundle(out).digest)
    assert {path.name for path in model.parent.iterdir()} == {"bundle", "model"}
