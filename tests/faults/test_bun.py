"""BUN: a bundle that is not byte for byte the one that was written is refused, and says where."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mla_deploy.bundle import Bundle, open_bundle
from mla_deploy.bundle.content import BLOCK_BYTES
from mla_deploy.bundle.manifest import parse_manifest, render
from mla_deploy.errors import IncompatibleError, InputError, IntegrityError, MlaDeployError
from tests.small_bundle import FILES, write_bundle

TIMES = int(os.environ.get("MLA_DEPLOY_FAULT_ROUNDS", "1"))
# Of the manifest's bits, one in this many is tried through `open_bundle` (coprime to 8, so that
# every bit position comes up); all are tried through its parser.
MANIFEST_STRIDE = 25 if TIMES == 1 else 1
NAMES = (*FILES, "manifest.json")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("original") / "bundle").path


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Bundle:
    """A copy: copying is quicker than publishing, which waits for the disk."""
    return open_bundle(shutil.copytree(original, tmp_path / "bundle"))


def refused(path: Path, error: type[MlaDeployError], code: str, **options: Any) -> MlaDeployError:
    with pytest.raises(error) as caught:
        open_bundle(path, **options)
    assert caught.value.code == code, caught.value
    return caught.value


def reseal(path: Path, changed: dict[str, Any]) -> None:
    """Write a manifest whose check is right, as somebody would who means to deceive."""
    body = {key: value for key, value in changed.items() if key != "check"}
    body["check"] = hashlib.sha256(render(body)).hexdigest()
    (path / "manifest.json").write_bytes(render(body))


# One flipped bit, every truncation


@pytest.mark.parametrize("name", NAMES)
def test_F_BUN_01_flipped_bit(bundle: Bundle, name: str) -> None:
    data = bytearray((bundle.path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle.path / name).write_bytes(data)
    code = "BUN-MANIFEST" if name == "manifest.json" else "BUN-HASH"
    told = refused(bundle.path, IntegrityError, code)
    assert name in told.message
    assert told.exit_status == 5


def test_F_BUN_01_every_bit_of_the_manifest(bundle: Bundle) -> None:
    """R8: all bits of the file that vouches for the others."""
    text = (bundle.path / "manifest.json").read_bytes()
    assert parse_manifest(text)
    accepted = []
    for bit in range(len(text) * 8):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            parse_manifest(bytes(flipped))
        except IntegrityError as error:
            assert error.code == "BUN-MANIFEST"
            continue
        accepted.append(bit)
    assert accepted == []


def test_F_BUN_01_bits_of_every_file(bundle: Bundle) -> None:
    """R8 through `open_bundle`."""
    tried = 0
    for name in NAMES:
        path = bundle.path / name
        text = path.read_bytes()
        stride = MANIFEST_STRIDE if name == "manifest.json" else 1
        with path.open("r+b") as file:
            for bit in range(0, len(text) * 8, stride):
                file.seek(bit // 8)
                file.write(bytes([text[bit // 8] ^ 1 << bit % 8]))
                file.flush()
                with pytest.raises(IntegrityError):
                    open_bundle(bundle.path)
                file.seek(bit // 8)
                file.write(text[bit // 8 : bit // 8 + 1])
                tried += 1
    assert open_bundle(bundle.path).digest == bundle.digest
    print(f"{tried} flips of {sum((bundle.path / name).stat().st_size for name in NAMES) * 8}")


def test_F_BUN_02_every_truncation(bundle: Bundle) -> None:
    for name in NAMES:
        path = bundle.path / name
        text = path.read_bytes()
        for size in reversed(range(len(text))):
            os.truncate(path, size)
            with pytest.raises(IntegrityError) as caught:
                open_bundle(bundle.path, verify="sizes")
            wanted = "BUN-MANIFEST" if name == "manifest.json" else "BUN-SIZE"
            assert caught.value.code == wanted
        path.write_bytes(text)


@pytest.mark.parametrize("name", NAMES)
def test_F_BUN_03_grown(bundle: Bundle, name: str) -> None:
    with (bundle.path / name).open("ab") as file:
        file.write(b"\n")
    code = "BUN-MANIFEST" if name == "manifest.json" else "BUN-SIZE"
    assert name in refused(bundle.path, IntegrityError, code, verify="sizes").message


def test_F_BUN_01_damaged_block_is_named(tmp_path: Path) -> None:
    """A file of two blocks and a bit: the block with the flipped bit stands in the message."""
    big = random.Random(5).randbytes(1 << 20) * 129
    bundle = write_bundle(tmp_path / "bundle", {**FILES, "more.safetensors": big})
    blocks = {name: len(record.blocks) for name, record in bundle.files.items()}
    assert blocks == {**dict.fromkeys(FILES, 0), "more.safetensors": 3}
    with (bundle.path / "more.safetensors").open("r+b") as file:
        file.seek(BLOCK_BYTES + 77)
        file.write(bytes([big[BLOCK_BYTES + 77] ^ 16]))
    assert "block 1 " in refused(bundle.path, IntegrityError, "BUN-HASH").message
    assert open_bundle(bundle.path, verify="sizes").verified == "sizes"


# The file set


@pytest.mark.parametrize("name", FILES)
def test_F_BUN_04_missing_file(bundle: Bundle, name: str) -> None:
    (bundle.path / name).unlink()
    assert name in refused(bundle.path, IntegrityError, "BUN-MISSING").message


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "..strange", "line\nbreak", "\udcff"])
def test_F_BUN_05_extra_file(bundle: Bundle, name: str) -> None:
    (bundle.path / os.fsencode(name).decode(errors="surrogateescape")).write_bytes(b"")
    told = refused(bundle.path, IntegrityError, "BUN-EXTRA", verify="sizes")
    assert "\n" not in told.message


def test_F_BUN_06_extra_folder(bundle: Bundle) -> None:
    (bundle.path / "cache").mkdir()
    refused(bundle.path, IntegrityError, "BUN-EXTRA")


@pytest.mark.parametrize("name", NAMES)
def test_F_BUN_07_symbolic_link(bundle: Bundle, name: str) -> None:
    """Right bytes behind a link are refused: the link may lead elsewhere tomorrow."""
    shutil.move(bundle.path / name, bundle.path.parent / name)
    (bundle.path / name).symlink_to(bundle.path.parent / name)
    refused(bundle.path, IntegrityError, "BUN-LINK")


@pytest.mark.parametrize("name", NAMES)
def test_F_BUN_08_hard_link(bundle: Bundle, name: str) -> None:
    os.link(bundle.path / name, bundle.path.parent / name)
    refused(bundle.path, IntegrityError, "BUN-LINK")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "folder"])
@pytest.mark.parametrize("name", ["weights.safetensors", "manifest.json"])
def test_F_BUN_09_not_a_regular_file(
    bundle: Bundle, name: str, make: Callable[[Path], None]
) -> None:
    (bundle.path / name).unlink()
    make(bundle.path / name)
    refused(bundle.path, IntegrityError, "BUN-LINK")


def test_F_BUN_10_case_only_clash(bundle: Bundle) -> None:
    changed = dict(bundle.manifest)
    changed["files"] = {**changed["files"], "Config.json": changed["files"]["config.json"]}
    shutil.copy(bundle.path / "config.json", bundle.path / "Config.json")
    reseal(bundle.path, changed)
    assert "case" in refused(bundle.path, IntegrityError, "BUN-MANIFEST").message


# The manifest


@pytest.mark.parametrize("path", ["no/such/folder", "a-file", "empty"])
def test_F_BUN_11_not_a_bundle(tmp_path: Path, path: str) -> None:
    (tmp_path / "a-file").write_text("x")
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / path, InputError, "BUN-NOT-BUNDLE").exit_status == 4


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\n",
        b"not json",
        b"[]",
        b"null",
        b"{}",
        b"\xff\xfe",
        b'{"format_version": 1, "format_version": 1}',
        b'{"format_version": NaN}',
        b'{"format_version": 1' + b"0" * 5000 + b"}",
        b"[" * 10_000,
        b'{"a":' * 10_000,
        b"[" + b"[],[],[]," * 400_000 + b"[]]",
        b" " * (8 << 20) + b"{}",
    ],
    ids=lambda text: repr(text[:24]),
)
def test_F_BUN_12_manifest_is_no_manifest(bundle: Bundle, text: bytes) -> None:
    (bundle.path / "manifest.json").write_bytes(text)
    with pytest.raises(IntegrityError) as caught:
        open_bundle(bundle.path)
    assert caught.value.code in ("BUN-MANIFEST", "BUN-SIZE")


def test_F_BUN_13_another_spelling(bundle: Bundle) -> None:
    """The same JSON value in other bytes is another digest, so it is refused."""
    path = bundle.path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    refused(bundle.path, IntegrityError, "BUN-MANIFEST")
    text = render(dict(bundle.manifest)).replace(b'"target": "cpu"', b'"target":  "cpu"')
    line = next(line for line in text.splitlines(True) if line.startswith(b'  "check"'))
    check = hashlib.sha256(text.replace(line, b"")).hexdigest().encode()
    path.write_bytes(text.replace(line, b'  "check": "' + check + b'",\n'))
    assert "spelled" in refused(bundle.path, IntegrityError, "BUN-MANIFEST").message


def test_F_BUN_14_newer_format(bundle: Bundle) -> None:
    reseal(bundle.path, {"format_version": 2, "files": {}, "something": "new"})
    told = refused(bundle.path, IncompatibleError, "BUN-FORMAT")
    assert (told.exit_status, told.details) == (6, {"found": 2, "wanted": 1})


@pytest.mark.parametrize("version", [0, -1, True, "1", 1.0, None, [1]])
def test_F_BUN_14_no_format(bundle: Bundle, version: object) -> None:
    reseal(bundle.path, {**bundle.manifest, "format_version": version})
    refused(bundle.path, IntegrityError, "BUN-MANIFEST")


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../../x", "/etc/passwd", "sub/x", "a\\..\\b", "nul\0", "", ".", "..", ".hidden",
     "manifest.json", "MANIFEST.JSON", "a" * 200, "\u202egnp", "e\u0301", "-rf"],
)  # fmt: skip
def test_F_BUN_15_name_in_the_manifest(bundle: Bundle, name: str) -> None:
    entry = bundle.manifest["files"]["config.json"]
    reseal(bundle.path, {**bundle.manifest, "files": {**bundle.manifest["files"], name: entry}})
    refused(bundle.path, IntegrityError, "BUN-MANIFEST")


@pytest.mark.parametrize(
    "entry",
    [None, 5, {}, {"bytes": 1}, {"bytes": -1, "sha256": "0" * 64},
     {"bytes": 1.5, "sha256": "0" * 64}, {"bytes": True, "sha256": "0" * 64},
     {"bytes": 1 << 63, "sha256": "0" * 64}, {"bytes": 1, "sha256": "0" * 63},
     {"bytes": 1, "sha256": "G" * 64}, {"bytes": 1, "sha256": "0" * 64, "blocks": ["0" * 64]},
     {"bytes": BLOCK_BYTES + 1, "sha256": "0" * 64},
     {"bytes": BLOCK_BYTES + 1, "sha256": "0" * 64, "blocks": ["0" * 64]},
     {"bytes": 1, "sha256": "0" * 64, "url": "x"}],
)  # fmt: skip
def test_F_BUN_16_file_entry(bundle: Bundle, entry: object) -> None:
    files = {**bundle.manifest["files"], "config.json": entry}
    reseal(bundle.path, {**bundle.manifest, "files": files})
    refused(bundle.path, IntegrityError, "BUN-MANIFEST")


WRONG: tuple[tuple[str, Any], ...] = (
    ("tool.version", None), ("libraries.onnx", 1), ("source.config_digest", 7),
    ("model.num_layers", 0), ("model.num_layers", True), ("model.num_layers", 1 << 60),
    ("model.num_layers", "2"), ("model.vocab_size", -5), ("model.rope_original_length", 0),
    ("dtype", "fp8"), ("cache.kind", "shared"), ("cache.itemsize", 3), ("cache.itemsize", True),
    ("cache.row_width", 0), ("cache.bytes_per_token", 1),
    ("cache.tensors", [{"rows": "tokens"}]), ("cache.capacity", 0),
    ("crossover_tokens", -1.0), ("crossover_tokens", "many"), ("all_logits", 0),
    ("io.prefill.file", "../x"), ("io.decode.file", "no.onnx"), ("io.decode.inputs", {}),
    ("io.decode.inputs", [{"name": "x"}]), ("io.alias", [["a"]]), ("io.alias", [["x", "logits"]]),
    ("io.alias", [["latent_cache.0", "x"]]), ("rewrite.decode", {"absorb": -1}),
    ("weights.file", "x"), ("weights.bytes", -1), ("io", []), ("cache", None),
)  # fmt: skip


@pytest.mark.parametrize(("member", "value"), WRONG)
def test_F_BUN_17_wrong_member(bundle: Bundle, member: str, value: object) -> None:
    changed = json.loads(json.dumps(dict(bundle.manifest)))
    *outer, last = member.split(".")
    section = changed
    for part in outer:
        section = section[part]
    section[last] = value
    reseal(bundle.path, changed)
    told = refused(bundle.path, IntegrityError, "BUN-MANIFEST")
    assert member.split(".")[0] in told.message
    del section[last]
    reseal(bundle.path, changed)
    if member != "libraries.onnx":
        refused(bundle.path, IntegrityError, "BUN-MANIFEST")


@pytest.mark.parametrize(
    "value",
    [None, 3, {"name": "x", "dtype": "fp32", "shape": "batch", "kind": "logits"},
     {"name": "x", "dtype": "fp32", "shape": [-1], "kind": "logits"},
     {"name": "x", "dtype": "fp32", "shape": [1] * 9, "kind": "logits"},
     {"name": "x", "dtype": "fp32", "shape": [1], "kind": "other"},
     {"name": "x" * 2000, "dtype": "fp32", "shape": [1], "kind": "logits"},
     {"name": "logits", "dtype": "fp32", "shape": [1], "kind": "logits"}],
)  # fmt: skip
def test_F_BUN_17_wrong_graph_value(bundle: Bundle, value: object) -> None:
    changed = json.loads(json.dumps(dict(bundle.manifest)))
    changed["io"]["prefill"]["outputs"].append(value)
    reseal(bundle.path, changed)
    refused(bundle.path, IntegrityError, "BUN-MANIFEST")


def test_F_BUN_18_byte_fuzz_of_the_manifest(bundle: Bundle) -> None:
    """R6: whatever the bytes, a refusal of our own family."""
    text = (bundle.path / "manifest.json").read_bytes()
    randomness = random.Random(18)
    for _ in range(25_000 * TIMES):
        mutant = bytearray(text)
        for _ in range(randomness.randint(1, 4)):
            start = randomness.randrange(len(mutant))
            stop = start + randomness.randrange(12)
            mutant[start:stop] = randomness.randbytes(randomness.randrange(12))
        if bytes(mutant) != text:
            with pytest.raises(IntegrityError):
                parse_manifest(bytes(mutant))


# Mixed and swapped bundles, and changes after the check


def test_F_BUN_19_stale_mix(bundle: Bundle, tmp_path: Path) -> None:
    """A graph of another export of the same size."""
    name = "decode.onnx"
    other = write_bundle(tmp_path / "other", {**FILES, name: FILES[name].swapcase()})
    shutil.copy(other.path / name, bundle.path / name)
    assert name in refused(bundle.path, IntegrityError, "BUN-HASH").message


def test_F_BUN_20_whole_bundle_swapped(bundle: Bundle, tmp_path: Path) -> None:
    other = write_bundle(tmp_path / "other", {**FILES, "decode.onnx": b"another graph"})
    told = refused(other.path, IntegrityError, "BUN-DIGEST", expect_digest=bundle.digest)
    assert told.details == {"found": other.digest, "wanted": bundle.digest}
    for pin in (bundle.digest, bundle.digest.upper(), f"sha256:{bundle.digest}\n"):
        assert open_bundle(bundle.path, expect_digest=pin) == bundle


@pytest.mark.parametrize("change", ["write", "replace", "remove", "link", "truncate"])
def test_F_BUN_21_changed_after_the_check(bundle: Bundle, change: str) -> None:
    path = bundle.path / "weights.safetensors"
    copy = bundle.path.parent / "copy"
    shutil.copy(path, copy)
    if change == "write":
        path.write_bytes(path.read_bytes())
    elif change == "replace":
        os.replace(copy, path)
    elif change == "truncate":
        os.truncate(path, 10)
    else:
        path.unlink()
        if change == "link":
            path.symlink_to(copy)
    for use in (bundle.file, bundle.read_bytes):
        with pytest.raises(IntegrityError) as caught:
            use(path.name)
        assert caught.value.code == "BUN-CHANGED"
    assert bundle.file("decode.onnx") == bundle.path / "decode.onnx"


@pytest.mark.parametrize("name", ["../bundle/config.json", "manifest.json", "none", "/etc/passwd"])
def test_F_BUN_22_only_files_of_the_manifest(bundle: Bundle, name: str) -> None:
    for use in (bundle.file, bundle.read_bytes):
        with pytest.raises(IntegrityError) as caught:
            use(name)
        assert caught.value.code == "BUN-MISSING"


def test_F_BUN_22_small_file_is_hashed_as_it_is_read(bundle: Bundle) -> None:
    """A sizes-only check finds no flipped bit; reading the file through the bundle does."""
    path = bundle.path / "config.json"
    path.write_bytes(path.read_bytes().replace(b"deepseek_v3", b"deepseek_v2"))
    opened = open_bundle(bundle.path, verify="sizes")
    with pytest.raises(IntegrityError) as caught:
        _ = opened.config
    assert caught.value.code == "BUN-HASH"
