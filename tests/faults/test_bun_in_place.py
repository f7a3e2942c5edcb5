"""BUN beside a checkpoint: what a reader checks of its files and of ours, and what it claims."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mla_deploy.bundle import Bundle, open_bundle, stage_in_place
from mla_deploy.bundle.manifest import sealed
from mla_deploy.bundle.verify import file_records
from mla_deploy.errors import IntegrityError, MlaDeployError
from tests.small_bundle import write_bundle
from tests.small_in_place import (
    DATA,
    FIRST,
    MANIFEST,
    PARTS,
    SHARD,
    manifest_of,
    write_in_place,
    write_source,
)

OWN = sorted(FIRST - {MANIFEST})


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_in_place(write_source(tmp_path / "model"))


def refused(path: Path, code: str, **options: Any) -> MlaDeployError:
    with pytest.raises(IntegrityError) as caught:
        open_bundle(path, **options)
    assert caught.value.code == code, str(caught.value)
    return caught.value


def reseal(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Write the manifest again, `change` applied and its check right."""
    body = json.loads((path / MANIFEST).read_text())
    change(body)
    records = file_records(body)
    (path / MANIFEST).write_bytes(sealed(body, records))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_opened_as_published(bundle: Bundle) -> None:
    opened = open_bundle(bundle.path)
    assert opened == bundle
    assert opened.verified == "headers"
    assert open_bundle(bundle.path, verify="sizes").verified == "sizes"
    assert set(opened.files) == {*OWN, "config.json", "tokenizer.json"}
    assert opened.weight_files == ("mla-deploy.weights", SHARD)
    assert opened.kept_bytes == 256
    assert opened.read_bytes("tokenizer.json") == b"{}"
    assert opened.config.kv_lora_rank == 16
    assert opened.graph("decode").name == "mla-deploy.decode.onnx"


def test_strangers_are_not_ours_to_judge(bundle: Bundle) -> None:
    (bundle.path / "manifest.json").write_text("of somebody else")
    (bundle.path / "mla-deploy.2.weights").write_bytes(b"of an export that was killed")
    (bundle.path / "figures").mkdir()
    assert open_bundle(bundle.path) == bundle


@pytest.mark.parametrize("name", [*OWN, MANIFEST, "config.json"])
def test_F_BUN_01_flipped_bit(bundle: Bundle, name: str) -> None:
    flip(bundle.path / name, 17)
    refused(bundle.path, "BUN-MANIFEST" if name == MANIFEST else "BUN-HASH")


@pytest.mark.parametrize("place", [0, 9, 40])
def test_F_BUN_01_flipped_bit_in_a_header_of_the_checkpoint(bundle: Bundle, place: int) -> None:
    flip(bundle.path / SHARD, place)
    assert SHARD in refused(bundle.path, "BUN-HASH").message


def test_tensors_of_the_checkpoint_are_not_hashed_and_the_manifest_says_so(bundle: Bundle) -> None:
    told = bundle.manifest["in_place"]["verified"]["header"]
    assert "not hashed" in told
    flip(bundle.path / SHARD, -1)
    assert open_bundle(bundle.path).verified == "headers"


@pytest.mark.parametrize("name", [*OWN, SHARD, "config.json"])
def test_F_BUN_02_other_size(bundle: Bundle, name: str) -> None:
    with (bundle.path / name).open("ab") as file:
        file.write(b"x")
    assert name in refused(bundle.path, "BUN-SIZE", verify="sizes").message


@pytest.mark.parametrize("name", [*OWN, SHARD, "tokenizer.json"])
def test_F_BUN_04_missing(bundle: Bundle, name: str) -> None:
    (bundle.path / name).unlink()
    assert name in refused(bundle.path, "BUN-MISSING").message


@pytest.mark.parametrize("name", [*OWN, SHARD, MANIFEST])
@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_F_BUN_07_link(bundle: Bundle, tmp_path: Path, name: str, kind: str) -> None:
    """ONNX Runtime would refuse the first, ONNX both: here it is told at once."""
    path = bundle.path / name
    shutil.move(path, tmp_path / "elsewhere")
    if kind == "symbolic":
        path.symlink_to(tmp_path / "elsewhere")
    else:
        os.link(tmp_path / "elsewhere", path)
    refused(bundle.path, "BUN-LINK")


def test_a_file_of_the_checkpoint_changes_after_it_was_verified(bundle: Bundle) -> None:
    opened = open_bundle(bundle.path)
    assert opened.file(SHARD) == bundle.path / SHARD
    flip(bundle.path / SHARD, -1)
    with pytest.raises(IntegrityError) as caught:
        opened.file(SHARD)
    assert caught.value.code == "BUN-CHANGED"


def test_a_weight_file_that_is_swapped_before_the_end(tmp_path: Path) -> None:
    """Recorded as one file, replaced by another of the same size: the acceptance sees it."""
    folder = write_source(tmp_path / "model")
    with pytest.raises(IntegrityError) as caught, stage_in_place(folder) as stage:
        for part in PARTS:
            stage.write_bytes(stage.named(part), b"x")
        made = manifest_of(stage, folder)
        header = (folder / SHARD).read_bytes()[:-256].replace(b'"w"', b'"v"')
        (folder / SHARD).write_bytes(header + DATA)
        stage.publish(made)
    assert caught.value.code == "BUN-HASH"
    assert not [name for name in os.listdir(folder) if "mla-deploy" in name]


# The manifest


def change_of(member: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(body: dict[str, Any]) -> None:
        *outer, last = member.split("/")
        section = body["in_place"]
        for part in outer:
            section = section[part]
        section[last] = value

    return change


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("tensors", -1), ("tensors", None), ("bytes", True), ("verified", []),
        ("verified", {"a": 1}),
        ("files", []), ("files/x", {}), (f"files/{SHARD}", None), (f"files/{SHARD}/bytes", -1),
        (f"files/{SHARD}/bytes", 1.0), (f"files/{SHARD}/hashed", 10**9),
        (f"files/{SHARD}/hashed", True), (f"files/{SHARD}/sha256", "0" * 63),
        (f"files/{SHARD}/sha256", "G" * 64), (f"files/{SHARD}/url", "x"),
    ],
)  # fmt: skip
def test_F_BUN_17_wrong_member(bundle: Bundle, member: str, value: object) -> None:
    reseal(bundle.path, change_of(member, value))
    assert "in_place" in refused(bundle.path, "BUN-MANIFEST").message


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/b", "", ".hidden", "mla-deploy.weights", "MLA-DEPLOY.x",
             "manifest.json", "Config.json", "nul\0"],
)  # fmt: skip
def test_F_BUN_15_name_in_the_manifest(bundle: Bundle, name: str) -> None:
    entry = bundle.manifest["in_place"]["files"]["config.json"]
    reseal(bundle.path, lambda body: body["in_place"]["files"].update({name: entry}))
    refused(bundle.path, "BUN-MANIFEST")


def test_more_files_than_a_process_may_open(bundle: Bundle) -> None:
    entry = bundle.manifest["in_place"]["files"][SHARD]
    many = {f"model-{number}.safetensors": entry for number in range(513)}
    reseal(bundle.path, lambda body: body["in_place"]["files"].update(many))
    refused(bundle.path, "BUN-MANIFEST")


def test_a_manifest_in_the_wrong_kind_of_folder(bundle: Bundle, tmp_path: Path) -> None:
    """One beside a checkpoint must not pass for a bundle of its own, nor the other way round."""
    shutil.copytree(bundle.path, tmp_path / "moved")
    (tmp_path / "moved" / MANIFEST).rename(tmp_path / "moved" / "manifest.json")
    refused(tmp_path / "moved", "BUN-MANIFEST")
    alone = write_bundle(tmp_path / "alone").path
    (alone / "manifest.json").rename(alone / MANIFEST)
    refused(alone, "BUN-MANIFEST")


def test_a_bundle_of_its_own_cannot_be_made_to_look_like_one(tmp_path: Path) -> None:
    alone = write_bundle(tmp_path / "alone").path
    (alone / MANIFEST).write_bytes((alone / "manifest.json").read_bytes())
    refused(alone, "BUN-MANIFEST")
