"""Bundle: what is written is what is read, its digest is the file's, its look-ups are typed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mla_deploy.bundle import Bundle, GraphValue, open_bundle, stage_bundle
from mla_deploy.bundle.content import BLOCK_BYTES, ContentHasher, FileRecord, record_of_descriptor
from mla_deploy.bundle.manifest import case_clash, is_plain_name, render, sealed
from mla_deploy.errors import InputError, IntegrityError
from tests.small_bundle import CONFIG, FILES, fill, manifest, write_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("bundle") / "out")


def test_round_trip(bundle: Bundle) -> None:
    opened = open_bundle(bundle.path)
    assert opened == bundle
    assert sorted(path.name for path in bundle.path.iterdir()) == sorted([*FILES, "manifest.json"])
    for name, data in FILES.items():
        assert opened.file(name) == bundle.path / name
        assert (bundle.path / name).read_bytes() == data == opened.read_bytes(name)
    assert {key: opened.manifest[key] for key in manifest()} == manifest()


def test_digest_is_what_sha256sum_prints(bundle: Bundle) -> None:
    printed = subprocess.run(
        ["sha256sum", bundle.path / "manifest.json"], capture_output=True, text=True, check=True
    )
    assert printed.stdout.split()[0] == bundle.digest
    lines = (bundle.path / "manifest.json").read_bytes().splitlines(keepends=True)
    without_check = b"".join(line for line in lines if not line.startswith(b'  "check"'))
    assert hashlib.sha256(without_check).hexdigest() == bundle.manifest["check"]


def test_same_content_same_digest(bundle: Bundle, tmp_path: Path) -> None:
    backwards = dict(reversed(FILES.items()))
    assert write_bundle(tmp_path / "again", backwards).digest == bundle.digest
    other = write_bundle(tmp_path / "other", {**FILES, "tokenizer.json": b"{}"})
    assert other.digest != bundle.digest


def test_config(bundle: Bundle) -> None:
    assert bundle.config.kv_lora_rank == CONFIG["kv_lora_rank"]
    assert bundle.config is bundle.config


def test_graph_lookups(bundle: Bundle) -> None:
    assert bundle.graph("decode") == bundle.path / "decode.onnx"
    assert [value.name for value in bundle.inputs("prefill")] == [
        "input_ids", "cache_lengths", "new_lengths", "latent_cache.0",
    ]  # fmt: skip
    assert bundle.outputs("decode")[1] == GraphValue(
        "latent_cache_out.0", "fp32", ("batch", 1, "capacity", 24), "latent_cache"
    )
    assert bundle.aliases == (("latent_cache.0", "latent_cache_out.0"),)


def test_top_level_is_read_only(bundle: Bundle) -> None:
    with pytest.raises(TypeError):
        bundle.manifest["target"] = "other"  # type: ignore[index]
    with pytest.raises(AttributeError):
        bundle.digest = ""  # type: ignore[misc]


def test_path_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written = write_bundle("out")
    opened = open_bundle("out")
    assert written.path == opened.path == tmp_path / "out"
    monkeypatch.chdir("/")
    assert opened.config.num_layers == 1


def test_a_link_to_a_bundle_is_followed(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(bundle.path)
    assert open_bundle(tmp_path / "current").digest == bundle.digest


def test_a_moved_bundle_is_opened_where_it_is(tmp_path: Path) -> None:
    digest = write_bundle(tmp_path / "out").digest
    os.rename(tmp_path / "out", tmp_path / "moved")
    assert open_bundle(tmp_path / "moved").digest == digest


def test_further_members_are_kept(tmp_path: Path) -> None:
    with stage_bundle(tmp_path / "out") as stage:
        fill(stage)
        stage.publish(manifest(notes=["kept"], crossover_tokens=None))
    assert open_bundle(tmp_path / "out").manifest["notes"] == ["kept"]


@pytest.mark.parametrize("value", [float("inf"), float("nan"), {1: 2}, object(), b"bytes"])
def test_manifest_holds_only_json(value: Any) -> None:
    """A caller's mistake, so a plain Python error."""
    with pytest.raises((ValueError, TypeError)):
        render({"value": value})


def test_manifest_is_refused_before_it_is_published(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError) as caught, stage_bundle(tmp_path / "out") as stage:
        fill(stage)
        stage.publish(manifest(dtype="fp8"))
    assert "dtype" in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_sealed_replaces_what_it_owns() -> None:
    """`files`, `check` and `format_version` of a caller are not trusted."""
    record = FileRecord(3, "0" * 64)
    text = sealed({**manifest(), "files": 5, "check": 6, "format_version": 7}, {"a": record})
    parsed = json.loads(text)
    assert (parsed["files"], parsed["format_version"]) == ({"a": record.to_dict()}, 1)
    assert text == sealed(manifest(), {"a": record})


@pytest.mark.parametrize("pin", ["", "abc", "0" * 63, "g" * 64, "sha512:" + "0" * 64])
def test_F_BUN_20_pin_is_no_digest(bundle: Bundle, pin: str) -> None:
    with pytest.raises(InputError) as caught:
        open_bundle(bundle.path, expect_digest=pin)
    assert caught.value.code == "BUN-EXPECT"


@pytest.mark.parametrize("name", ["a", "A-b_c+d.e", "0", "_x", "a" * 128, "model-00001-of-2.x"])
def test_plain_names(name: str) -> None:
    assert is_plain_name(name)


def test_case_clash() -> None:
    assert case_clash(["a", "b", "A"]) == ("a", "A")
    assert case_clash(["a", "b", "a"]) is None


# Content: sizes around the block border, against hashlib block by block.


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES, BLOCK_BYTES + 1])
def test_record_of_a_stream(size: int, tmp_path: Path) -> None:
    data = (os.urandom(1 << 16) * (size // (1 << 16) + 1))[:size]
    starts = range(0, size, BLOCK_BYTES) if size > BLOCK_BYTES else ()
    expected = FileRecord(
        size,
        hashlib.sha256(data).hexdigest(),
        tuple(hashlib.sha256(data[at : at + BLOCK_BYTES]).hexdigest() for at in starts),
    )
    hasher, view, at = ContentHasher(), memoryview(data), 0
    for piece in (1, 1 << 20, 5, 40 << 20, size):
        hasher.update(view[at : at + piece])
        at += piece
    assert hasher.record() == expected
    (tmp_path / "file").write_bytes(data)
    with (tmp_path / "file").open("rb") as file:
        assert record_of_descriptor(file.fileno()) == expected


def test_import_loads_no_heavy_library() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys, mla_deploy.bundle\n"
         "print({'torch', 'onnx', 'numpy', 'onnxruntime'} & set(sys.modules))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "set()"
