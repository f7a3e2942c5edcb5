"""F-CKPT: checkpoint bytes and index, one test or parameter per line of the fault list."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mla_deploy.checkpoint import open_checkpoint
from tests.checkpoint.edits import (
    INDEX,
    WEIGHTS,
    Header,
    edit_header,
    edit_index,
    edit_weights,
    joined_file,
    split_file,
)
from tests.faults.refused import refused, refused_within_memory
from tests.tiny import write_tiny

FIRST = "lm_head.weight"  # first and second in the file
SECOND = "model.embed_tokens.weight"
SIZE = 96 * 48 * 4


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "good")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "sharded", max_shard_size="60KB")


def opened(folder: Path) -> None:
    open_checkpoint(folder).close()


def set_entry(name: str, **changes: Any) -> Callable[[Header], None]:
    def change(header: Header) -> None:
        header[name].update(changes)

    return change


def drop_key(name: str, key: str) -> Callable[[Header], None]:
    def change(header: Header) -> None:
        del header[name][key]

    return change


def replaced(value: Any) -> Callable[[Header], None]:
    def change(header: Header) -> None:
        header[FIRST] = value

    return change


# ------------------------------------------------------------------ 01-26: malformed headers

BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "F_CKPT_01_empty_file": (lambda _: b"", "CKPT-HEADER"),
    "F_CKPT_02_seven_bytes": (lambda b: b[:7], "CKPT-HEADER"),
    "F_CKPT_03_header_of_no_bytes": (lambda b: joined_file(b"", b), "CKPT-HEADER"),
    "F_CKPT_04_length_beyond_the_file": (
        lambda b: (len(b)).to_bytes(8, "little") + b[8:], "CKPT-HEADER"),
    "F_CKPT_05_length_of_2_to_the_63": (
        lambda b: (1 << 63).to_bytes(8, "little") + b[8:], "CKPT-HEADER"),
    "F_CKPT_06_not_utf8": (lambda b: joined_file(b'{"\xff": 1}', b""), "CKPT-HEADER"),
    "F_CKPT_07_not_json": (lambda b: joined_file(b"tensors = 3", b""), "CKPT-HEADER"),
    "F_CKPT_08_json_array": (lambda b: joined_file(b"[1, 2]", b""), "CKPT-HEADER"),
    "F_CKPT_09_header_cut_short": (
        lambda b: joined_file(b[8:200], b""), "CKPT-HEADER"),
    "F_CKPT_25_hole_at_the_start": (
        lambda b: joined_file(
            json.dumps({"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}).encode(),
            bytes(8)), "CKPT-RANGE"),
    "F_CKPT_26_bytes_after_the_last_tensor": (lambda b: b + b"\0", "CKPT-RANGE"),
    "F_CKPT_26_last_tensor_cut": (lambda b: b[:-1], "CKPT-RANGE"),
}  # fmt: skip


@pytest.mark.parametrize("case", BYTES)
def test_malformed_file(good: Path, case: str) -> None:
    change, code = BYTES[case]
    (good / WEIGHTS).write_bytes(change((good / WEIGHTS).read_bytes()))
    refused(lambda: opened(good), code)


HEADERS: dict[str, tuple[Callable[[Header], None], str, str]] = {
    "F_CKPT_10_entry_is_a_list": (replaced([1]), "CKPT-HEADER", FIRST),
    "F_CKPT_11_no_dtype": (drop_key(FIRST, "dtype"), "CKPT-HEADER", FIRST),
    "F_CKPT_12_no_shape": (drop_key(FIRST, "shape"), "CKPT-HEADER", FIRST),
    "F_CKPT_13_no_offsets": (drop_key(FIRST, "data_offsets"), "CKPT-HEADER", FIRST),
    "F_CKPT_14_unknown_key": (set_entry(FIRST, stride=[1]), "CKPT-HEADER", FIRST),
    "F_CKPT_15_unknown_dtype": (set_entry(FIRST, dtype="F12"), "CKPT-DTYPE", FIRST),
    "F_CKPT_16_dtype_is_a_number": (set_entry(FIRST, dtype=4), "CKPT-DTYPE", FIRST),
    "F_CKPT_17_shape_is_a_text": (set_entry(FIRST, shape="96"), "CKPT-HEADER", FIRST),
    "F_CKPT_18_negative_size": (set_entry(FIRST, shape=[-96, -48]), "CKPT-HEADER", FIRST),
    "F_CKPT_19_size_is_a_fraction": (set_entry(FIRST, shape=[96.0, 48]), "CKPT-HEADER", FIRST),
    "F_CKPT_19_size_is_true": (set_entry(FIRST, shape=[True, 4608]), "CKPT-HEADER", FIRST),
    "F_CKPT_20_product_overflows": (
        set_entry(FIRST, shape=[1 << 40, 1 << 40]), "CKPT-RANGE", FIRST),
    "F_CKPT_20_size_of_2_to_the_62": (set_entry(FIRST, shape=[1 << 62]), "CKPT-HEADER", FIRST),
    "F_CKPT_20_thousand_axes": (set_entry(FIRST, shape=[1] * 1000), "CKPT-HEADER", FIRST),
    "F_CKPT_21_reversed_range": (set_entry(FIRST, data_offsets=[SIZE, 0]), "CKPT-RANGE", FIRST),
    "F_CKPT_22_negative_offset": (set_entry(FIRST, data_offsets=[-4, SIZE]), "CKPT-RANGE", FIRST),
    "F_CKPT_22_three_offsets": (set_entry(FIRST, data_offsets=[0, 1, 2]), "CKPT-RANGE", FIRST),
    "F_CKPT_23_range_beyond_the_file": (
        set_entry(FIRST, data_offsets=[1 << 50, (1 << 50) + SIZE]), "CKPT-RANGE", FIRST),
    "F_CKPT_24_overlap": (set_entry(SECOND, data_offsets=[4, SIZE + 4]), "CKPT-RANGE", "overlaps"),
    "F_CKPT_24_same_bytes_twice": (
        set_entry(SECOND, data_offsets=[0, SIZE]), "CKPT-RANGE", "overlaps"),
    "F_CKPT_25_hole": (lambda header: header.pop(SECOND), "CKPT-RANGE", "a hole of"),
    "F_CKPT_26_shape_and_range_disagree": (set_entry(FIRST, shape=[96, 47]), "CKPT-RANGE", FIRST),
    "F_CKPT_26_dtype_and_range_disagree": (set_entry(FIRST, dtype="F64"), "CKPT-RANGE", FIRST),
    "F_CKPT_26_metadata_is_a_list": (
        lambda header: header.update(__metadata__=[1]), "CKPT-HEADER", "__metadata__"),
    "F_CKPT_33_zero_size": (
        set_entry(FIRST, shape=[0, 48], data_offsets=[0, 0]), "CKPT-EMPTY", FIRST),
    "F_CKPT_34_scalar": (set_entry(FIRST, shape=[], data_offsets=[0, 4]), "CKPT-EMPTY", FIRST),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_malformed_entry(good: Path, case: str) -> None:
    change, code, named = HEADERS[case]
    refused(lambda: opened(edit_header(good, change)), code, named)


# ------------------------------------------------------------------ 27-36: what safetensors takes


def with_header_text(folder: Path, change: Callable[[bytes], bytes]) -> Path:
    content = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = change(content[8 : 8 + length])
    (folder / WEIGHTS).write_bytes(joined_file(header, content[8 + length :]))
    return folder


def test_F_CKPT_27_duplicate_name(good: Path) -> None:
    folder = with_header_text(good, lambda t: t.replace(SECOND.encode(), FIRST.encode(), 1))
    refused(lambda: opened(folder), "CKPT-HEADER", FIRST, "twice")


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "", "a\0b", "..", "a/b", "a\\b", "a b", "\ud800", "\u202e", "x" * 600],
    ids=lambda name: f"F_CKPT_28_29_30_{ascii(name)[:24]}",
)
def test_names_that_are_not_plain(good: Path, name: str) -> None:
    refused(
        lambda: opened(edit_header(good, lambda h: h.update({name: h.pop(FIRST)}))), "CKPT-NAME"
    )


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), float("-inf")],
    ids=["F_CKPT_31_59_nan", "F_CKPT_31_60_inf", "F_CKPT_31_61_minus_inf"],
)
def test_one_value_that_is_not_finite(good: Path, value: float) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    edit_weights(good, lambda tensors: tensors[name].__setitem__((7, 11), value))
    with open_checkpoint(good) as checkpoint:
        refused(lambda: checkpoint.read(name), "CKPT-NONFINITE", name)


def test_F_CKPT_32_no_tensors(good: Path) -> None:
    (good / WEIGHTS).write_bytes(joined_file(b"{}", b""))
    refused(lambda: opened(good), "CKPT-EMPTY")


def test_F_CKPT_35_leading_space_is_accepted(good: Path) -> None:
    opened(with_header_text(good, lambda text: b"  \n" + text))


def test_F_CKPT_36_header_of_120_megabytes(good: Path) -> None:
    with (good / WEIGHTS).open("wb") as file:
        file.write((120 << 20).to_bytes(8, "little"))
        file.truncate((120 << 20) + 8)
    refused_within_memory(lambda: opened(good), "CKPT-HEADER", "125829120")


def test_F_CKPT_36_header_of_two_million_lists(good: Path) -> None:
    (good / WEIGHTS).write_bytes(joined_file(b'{"a":[' + b"[]," * 2_000_000 + b"[]]}", b""))
    refused_within_memory(lambda: opened(good), "CKPT-HEADER", "values")


def test_F_CKPT_36_header_of_many_names(good: Path) -> None:
    text = "{" + ",".join(f'"{i}":0' for i in range(200_000)) + "}"
    (good / WEIGHTS).write_bytes(joined_file(text.encode(), b""))
    refused_within_memory(lambda: opened(good), "CKPT-HEADER", "200000 tensors")


# ------------------------------------------------------------------ 37-45: where an index leads

_opened_paths: list[str] = []
_watching = False


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event == "open" and isinstance(arguments[0], str):
        _opened_paths.append(arguments[0])


sys.addaudithook(_watch)


@pytest.fixture
def opened_paths() -> Iterator[list[str]]:
    """Every path that Python opens while the test runs."""
    global _watching
    _opened_paths.clear()
    _watching = True
    yield _opened_paths
    _watching = False


PATHS = {
    "F_CKPT_37_parent": "../outside.safetensors",
    "F_CKPT_37_deeper": "a/../../outside.safetensors",
    "F_CKPT_38_absolute": "/etc/outside.safetensors",
    "F_CKPT_39_backslash": "a\\..\\outside.safetensors",
    "F_CKPT_40_nul": "a\0outside.safetensors",
    "F_CKPT_41_folder_inside": "sub/outside.safetensors",
    "F_CKPT_42_surrogate": "\ud800outside.safetensors",
    "F_CKPT_44_bin": "outside.bin",
    "F_CKPT_44_pickle_with_a_tail": "outside.safetensors.pkl",
    "F_CKPT_44_not_a_text": 7,
    "F_CKPT_44_null": None,
    "F_CKPT_44_url": "https://example.org/outside.safetensors",
}


@pytest.mark.parametrize("case", PATHS)
def test_index_value_is_not_a_plain_name(sharded: Path, opened_paths: list[str], case: str) -> None:
    (sharded.parent / "outside.safetensors").write_bytes(b"secret")

    def change(index: Any) -> Any:
        index["weight_map"][FIRST] = PATHS[case]
        return index

    edit_index(sharded, change)
    opened_paths.clear()
    refused(lambda: opened(sharded), "CKPT-INDEX-PATH", FIRST)
    assert INDEX in opened_paths
    assert not [path for path in opened_paths if "outside" in path]


def shard_of(folder: Path, number: int) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[number]


def test_F_CKPT_42_link_that_leads_out(sharded: Path, opened_paths: list[str]) -> None:
    shard = shard_of(sharded, 0)
    shard.rename(sharded.parent / "outside.safetensors")
    shard.symlink_to("../outside.safetensors")
    opened_paths.clear()
    refused(lambda: opened(sharded), "FILE-LINK", shard.name)
    assert not [path for path in opened_paths if "outside" in path]


def test_F_CKPT_43_fifo(sharded: Path, opened_paths: list[str]) -> None:
    shard = shard_of(sharded, 1)
    shard.unlink()
    os.mkfifo(shard)
    opened_paths.clear()
    refused(lambda: opened(sharded), "FILE-TYPE", shard.name)
    assert shard.name not in opened_paths


def test_F_CKPT_43_folder_in_place_of_a_shard(sharded: Path) -> None:
    shard = shard_of(sharded, 1)
    shard.unlink()
    shard.mkdir()
    refused(lambda: opened(sharded), "FILE-TYPE", shard.name)


def test_F_CKPT_45_hub_cache_loads(tmp_path: Path) -> None:
    whole = write_tiny(tmp_path / "whole", max_shard_size="60KB")
    snapshot = tmp_path / "models--x--y" / "snapshots" / "0123abcd"
    blobs = tmp_path / "models--x--y" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(whole.iterdir())):
        path.rename(blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    with open_checkpoint(snapshot) as checkpoint:
        for name in checkpoint.tensors:
            checkpoint.read(name)


# ------------------------------------------------------------------ 46-55: index against shards


def test_F_CKPT_46_shard_missing(sharded: Path) -> None:
    shard = shard_of(sharded, 1)
    shard.unlink()
    refused(lambda: opened(sharded), "CKPT-SHARD-MISSING", shard.name)


def test_F_CKPT_47_in_the_index_not_in_the_shard(sharded: Path) -> None:
    def change(index: Any) -> Any:
        index["weight_map"]["model.ghost.weight"] = shard_of(sharded, 0).name
        return index

    refused(lambda: opened(edit_index(sharded, change)), "CKPT-INDEX-KEY", "model.ghost.weight")


def test_F_CKPT_48_in_the_shard_not_in_the_index(sharded: Path) -> None:
    def change(index: Any) -> Any:
        del index["weight_map"]["model.norm.weight"]
        return index

    refused(lambda: opened(edit_index(sharded, change)), "CKPT-INDEX-KEY", "model.norm.weight")


def test_F_CKPT_48_in_another_shard(sharded: Path) -> None:
    def change(index: Any) -> Any:
        files = sorted(set(index["weight_map"].values()))
        here = files.index(index["weight_map"]["model.norm.weight"])
        index["weight_map"]["model.norm.weight"] = files[here - 1]
        return index

    refused(lambda: opened(edit_index(sharded, change)), "CKPT-INDEX-KEY", "model.norm.weight")


def test_F_CKPT_49_in_two_shards(sharded: Path) -> None:
    first, last = shard_of(sharded, 0), shard_of(sharded, -1)
    header, data = split_file(first.read_bytes())
    name = next(name for name in header if name != "__metadata__")
    other, more = split_file(last.read_bytes())
    begin, end = header[name]["data_offsets"]
    header[name]["data_offsets"] = [len(more), len(more) + end - begin]
    other[name] = header[name]
    last.write_bytes(joined_file(json.dumps(other).encode(), more + data[begin:end]))
    refused(lambda: opened(sharded), "CKPT-DUPLICATE", name, first.name, last.name)


def test_F_CKPT_50_stray_shard_is_a_note(sharded: Path) -> None:
    (sharded / "model-00099-of-00099.safetensors").write_bytes(b"never opened")
    with open_checkpoint(sharded) as checkpoint:
        assert any("model-00099-of-00099" in note for note in checkpoint.notes)


def test_F_CKPT_51_another_total_size_is_a_note(sharded: Path) -> None:
    def change(index: Any) -> Any:
        index["metadata"]["total_size"] = 12345
        return index

    with open_checkpoint(edit_index(sharded, change)) as checkpoint:
        assert any("total_size 12345" in note for note in checkpoint.notes)


@pytest.mark.parametrize("size", [-1, "much", True, 0.5, [1]], ids=repr)
def test_F_CKPT_51_total_size_is_no_size(sharded: Path, size: Any) -> None:
    def change(index: Any) -> Any:
        index["metadata"]["total_size"] = size
        return index

    refused(lambda: opened(edit_index(sharded, change)), "CKPT-INDEX", "total_size")


def test_F_CKPT_52_duplicate_key_in_the_index(sharded: Path) -> None:
    text = (sharded / INDEX).read_text()
    (sharded / INDEX).write_text(text.replace(FIRST, SECOND))
    refused(lambda: opened(sharded), "CKPT-INDEX", SECOND, "twice")


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_F_CKPT_52_index_without_a_map(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    refused(lambda: opened(sharded), "CKPT-INDEX", "weight_map")


def test_F_CKPT_53_index_of_65_mebibytes(sharded: Path) -> None:
    with (sharded / INDEX).open("wb") as file:
        file.truncate(65 << 20)
    refused_within_memory(lambda: opened(sharded), "FILE-SIZE", INDEX)


def test_F_CKPT_53_index_nested_10000_deep(sharded: Path) -> None:
    (sharded / INDEX).write_text("[" * 10_000 + "]" * 10_000)
    refused_within_memory(lambda: opened(sharded), "CKPT-INDEX", "nested")


def test_F_CKPT_53_index_of_millions_of_values(sharded: Path) -> None:
    (sharded / INDEX).write_text('{"weight_map":[' + "[]," * 5_000_000 + "[]]}")
    refused_within_memory(lambda: opened(sharded), "CKPT-INDEX", "values")
