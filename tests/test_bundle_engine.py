"""`engine/` in a bundle: known when its record holds, refused when anything differs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mla_deploy.bundle import Bundle, open_bundle, stage_bundle, stage_engine
from mla_deploy.bundle.manifest import render
from mla_deploy.errors import MlaDeployError
from tests.small_bundle import fill, manifest, names_in, write_bundle

PLANS = {"prefill.plan": b"a plan" * 100, "decode.plan": b"another plan" * 100}


def record(bundle: Bundle, **changes: Any) -> dict[str, Any]:
    return {
        "bundle_digest": bundle.digest, "target": "rtx-40", "release": "rtx-1.7", "dtype": "fp16",
        "runtime": {"package": "tensorrt_rtx", "version": "1.7.1"}, "sms": ["8.9"],
        "graphs": {"prefill": {}, "decode": {}}, **changes,
    }  # fmt: skip


def write_engine(bundle: Bundle, *, plans: dict[str, bytes] = PLANS, **changes: Any) -> Bundle:
    replace = changes.pop("replace", False)
    with stage_engine(bundle, replace=replace) as stage:
        for name, data in plans.items():
            stage.write_bytes(name, data)
        return stage.publish(record(bundle, **changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_engine(write_bundle(tmp_path / "b"))
    return tmp_path / "b"


def code_of(folder: Path, **options: Any) -> str:
    with pytest.raises(MlaDeployError) as caught:
        open_bundle(folder, **options)
    return caught.value.code


def test_engines_are_verified_with_the_bundle(folder: Path) -> None:
    bundle = open_bundle(folder)
    assert bundle.engine is not None
    assert (bundle.engine.release, bundle.engine.sms) == ("rtx-1.7", ("8.9",))
    assert bundle.engine.read_plan("decode") == PLANS["decode.plan"]
    assert bundle.engine.facts["runtime"]["version"] == "1.7.1"
    assert open_bundle(folder, engine=False).engine is None
    assert names_in(folder.parent) == ["b"]


def _edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Another engine.json under a check that holds, as a later build might have written it."""
    path = folder / "engine" / "engine.json"
    facts = json.loads(path.read_bytes())
    change(facts)
    facts.pop("check")
    path.write_bytes(render({**facts, "check": hashlib.sha256(render(facts)).hexdigest()}))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "no record": ("BUN-ENGINE", lambda f: (f / "engine.json").unlink()),
    "record is empty": ("BUN-ENGINE", lambda f: (f / "engine.json").write_bytes(b"")),
    "record flipped": ("BUN-ENGINE", lambda f: _flip(f / "engine.json")),
    "record is a link": ("BUN-ENGINE", lambda f: _link(f / "engine.json")),
    "record is a list": ("BUN-ENGINE", lambda f: (f / "engine.json").write_bytes(b"[]\n")),
    "plan flipped": ("BUN-HASH", lambda f: _flip(f / "decode.plan")),
    "plan truncated": ("BUN-SIZE", lambda f: os.truncate(f / "decode.plan", 100)),
    "plan missing": ("BUN-MISSING", lambda f: (f / "decode.plan").unlink()),
    "plan is a link": ("BUN-LINK", lambda f: _link(f / "decode.plan")),
    "another file": ("BUN-EXTRA", lambda f: (f / "notes.txt").write_bytes(b"hello")),
    "another folder": ("BUN-EXTRA", lambda f: (f / "cache").mkdir()),
    "later format": ("BUN-FORMAT", lambda f: _edit(f.parent, lambda r: r.update(format_version=2))),
    "another manifest": (
        "BUN-ENGINE", lambda f: _edit(f.parent, lambda r: r.update(bundle_digest="0" * 64)),
    ),
    "a member is gone": ("BUN-ENGINE", lambda f: _edit(f.parent, lambda r: r.pop("release"))),
    "a member is another": ("BUN-ENGINE", lambda f: _edit(f.parent, lambda r: r.update(sms=8))),
    "a path for a name": (
        "BUN-MANIFEST",
        lambda f: _edit(f.parent, lambda r: r["files"].update({"../x": r["files"]["decode.plan"]})),
    ),
    "a file in its place": ("BUN-EXTRA", lambda f: (shutil.rmtree(f), f.write_bytes(b""))),
    "a link in its place": ("BUN-EXTRA", lambda f: _link(f)),
}  # fmt: skip


def _link(path: Path) -> None:
    other = path.parent.parent.parent / f"moved-{path.name}"
    os.rename(path, other)
    os.symlink(other, path)


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found(folder: Path, case: str) -> None:
    code, damage = DAMAGE[case]
    damage(folder / "engine")
    assert code_of(folder) == code
    assert open_bundle(folder, engine=False).digest  # the bundle itself is whole


def test_every_flipped_bit_of_a_small_record_is_found(folder: Path) -> None:
    path = folder / "engine" / "engine.json"
    good = path.read_bytes()
    for index in range(0, len(good), 7):
        path.write_bytes(good[:index] + bytes([good[index] ^ (1 << index % 8)]) + good[index + 1 :])
        assert code_of(folder, verify="sizes") in ("BUN-ENGINE", "BUN-MANIFEST", "BUN-FORMAT")
    path.write_bytes(good)
    assert open_bundle(folder).engine is not None


def test_sizes_only_does_not_read_plans(folder: Path) -> None:
    _flip(folder / "engine" / "decode.plan")
    bundle = open_bundle(folder, verify="sizes")
    assert bundle.engine is not None
    with pytest.raises(MlaDeployError) as caught:
        bundle.engine.read_plan("decode")
    assert caught.value.code == "BUN-HASH"


def test_a_plan_that_grew_or_went_after_it_was_verified(folder: Path) -> None:
    engine = open_bundle(folder).engine
    assert engine is not None
    with (folder / "engine" / "decode.plan").open("ab") as file:
        file.write(b"more")
    (folder / "engine" / "prefill.plan").unlink()
    for graph, code in (("decode", "BUN-SIZE"), ("prefill", "BUN-MISSING")):
        with pytest.raises(MlaDeployError) as caught:
            engine.read_plan(graph)  # type: ignore[arg-type]
        assert caught.value.code == code


def test_engines_stay_unless_replaced(folder: Path) -> None:
    bundle = open_bundle(folder)
    with pytest.raises(MlaDeployError) as caught:
        write_engine(bundle)
    assert caught.value.code == "BUN-EXISTS"
    newer = write_engine(bundle, replace=True, release="rtx-1.8")
    assert newer.engine is not None and newer.engine.release == "rtx-1.8"
    assert names_in(folder.parent) == ["b"]


def test_what_no_build_wrote_is_not_replaced(folder: Path) -> None:
    (folder / "engine" / "notes.txt").write_bytes(b"mine")
    bundle = open_bundle(folder, engine=False)
    with pytest.raises(MlaDeployError, match="no build wrote") as caught:
        write_engine(bundle, replace=True)
    assert caught.value.code == "BUN-EXISTS"
    assert (folder / "engine" / "notes.txt").read_bytes() == b"mine"


@pytest.mark.parametrize("replace", [False, True])
def test_a_stage_that_is_left_changes_nothing(folder: Path, replace: bool) -> None:
    bundle = open_bundle(folder)
    if not replace:
        shutil.rmtree(folder / "engine")
    with pytest.raises(KeyboardInterrupt), stage_engine(bundle, replace=replace) as stage:
        stage.write_bytes("decode.plan", b"half")
        assert open_bundle(folder).digest == bundle.digest  # others may use it meanwhile
        raise KeyboardInterrupt
    assert names_in(folder.parent) == ["b"]
    assert (open_bundle(folder).engine is not None) == replace


def test_a_bundle_replaced_meanwhile_gets_no_engines(folder: Path) -> None:
    bundle = open_bundle(folder)
    shutil.rmtree(folder / "engine")
    with pytest.raises(MlaDeployError) as caught, stage_engine(bundle) as stage:
        stage.write_bytes("decode.plan", b"plan")
        shutil.rmtree(folder)
        write_bundle_of(folder, dtype="fp16")
        stage.publish(record(bundle))
    assert caught.value.code in ("BUN-DIGEST", "BUN-NOT-BUNDLE")
    assert "engine" not in names_in(folder)


def write_bundle_of(out: Path, **changes: Any) -> None:
    """Published elsewhere and moved in: the lock at `out` is held."""
    with stage_bundle(out.with_name("other")) as stage:
        fill(stage)
        stage.publish(manifest(**changes))
    os.rename(out.with_name("other"), out)


def test_a_bundle_with_engines_is_replaced_whole(folder: Path) -> None:
    again = write_bundle(folder, replace=True)
    assert again.engine is None and "engine" not in names_in(folder)


def test_a_bundle_with_somebody_s_engine_folder_is_not_replaced(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b")
    (tmp_path / "b" / "engine").mkdir()
    (tmp_path / "b" / "engine" / "thesis.tex").write_bytes(b"years")
    with pytest.raises(MlaDeployError) as caught:
        write_bundle(tmp_path / "b", replace=True)
    assert caught.value.code == "BUN-EXISTS"
    assert (tmp_path / "b" / "engine" / "thesis.tex").exists()
