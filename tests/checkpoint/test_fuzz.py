"""Fuzz of the four parsers: only our own refusals may escape, and what we accept is right."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from mla_deploy.checkpoint.header import TensorInfo, read_header
from mla_deploy.checkpoint.index import INDEX_NAME, check_against_index, find_weight_files
from mla_deploy.config import parse_config
from mla_deploy.door import open_folder
from mla_deploy.errors import MlaDeployError
from mla_deploy.strict_json import parse_json
from tests.faults.test_cfg import GOOD

ROUNDS = 400
SETTINGS = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.ones(4, dtype=torch.bfloat16),
    "c.d": torch.full((3, 1, 2), 7, dtype=torch.uint8),
}


def accepted(act: Callable[[], Any]) -> Any:
    """The result, or None for a refusal of ours; anything else escapes and fails the test."""
    try:
        return act()
    except MlaDeployError as error:
        assert error.code and error.message and error.exit_status in (4, 5)
        return None


def mutated(content: bytes, source: random.Random) -> bytes:
    """One to four edits: flip, replace, insert, delete, repeat or cut."""
    out = bytearray(content)
    for _ in range(source.randint(1, 4)):
        place = source.randrange(len(out) + 1)
        edit = source.randrange(6)
        if edit == 0 and place < len(out):
            out[place] ^= 1 << source.randrange(8)
        elif edit == 1:
            out[place : place + 1] = bytes([source.choice(b'0123456789-+eE.,:[]{}" \\\xff\0')])
        elif edit == 2:
            out[place:place] = source.choice([b"[", b"{", b'"', b"9" * 30, b"null", b'"a":', b"-"])
        elif edit == 3:
            del out[place : place + source.randint(1, 8)]
        elif edit == 4:
            out[place:place] = out[place : place + 40]
        else:
            del out[place:]
    return bytes(out)


def headers_of(content: bytes) -> tuple[TensorInfo, ...] | None:
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        found: tuple[TensorInfo, ...] | None = accepted(
            lambda: read_header(file.fileno(), "x.safetensors")
        )
        return found


def check_against_safetensors(content: bytes) -> bool:
    """What we accept, safetensors accepts, with the same names, shapes and bytes."""
    found = headers_of(content)
    if found is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(content)
        theirs = load_file(path)
    assert {info.name: info.shape for info in found} == {
        name: tuple(value.shape) for name, value in theirs.items()
    }
    for info in found:
        ours = content[info.offset : info.offset + info.nbytes]
        assert ours == theirs[info.name].contiguous().view(torch.uint8).numpy().tobytes()
    return True


def test_mutated_files_against_safetensors() -> None:
    content = save(TENSORS)
    source = random.Random(20)
    assert check_against_safetensors(content)
    accepted_count = sum(check_against_safetensors(mutated(content, source)) for _ in range(ROUNDS))
    assert 0 < accepted_count < ROUNDS


def test_every_truncation_is_refused() -> None:
    content = save(TENSORS)
    for length in range(len(content)):
        assert headers_of(content[:length]) is None


def test_every_bit_of_a_header() -> None:
    content = save({"a": TENSORS["a"]})
    header = 8 + int.from_bytes(content[:8], "little")
    for bit in range(header * 8):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        check_against_safetensors(bytes(flipped))


@SETTINGS
@given(entry=JSON, name=st.text(max_size=20))
def test_any_entry_in_a_header(entry: Any, name: str) -> None:
    header = {"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}, name: entry}
    text = json.dumps(header).encode()
    headers_of(len(text).to_bytes(8, "little") + text + bytes(4))


@SETTINGS
@given(
    shape=st.lists(st.integers(-2, 2**66) | st.just(2), max_size=5),
    offsets=st.lists(st.integers(-2, 2**66) | st.just(4), max_size=3),
    dtype=st.sampled_from(["U8", "F32", "BF16", "F8_E4M3", "X", ""]),
)
def test_any_numbers_in_an_entry(shape: list[int], offsets: list[int], dtype: str) -> None:
    header = {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}
    text = json.dumps(header).encode()
    check_against_safetensors(len(text).to_bytes(8, "little") + text + bytes(4))


@SETTINGS
@given(field=st.sampled_from([*sorted(GOOD), "rope_parameters", "rope_scaling", "x"]), value=JSON)
def test_any_value_of_a_config_field(field: str, value: Any) -> None:
    text = json.dumps({**GOOD, field: value}).encode()
    config = accepted(lambda: parse_config(text))
    if config is not None:
        assert config.num_layers >= 1 and config.qk_rope_head_dim % 2 == 0
        assert len(config.digest) == 64


def test_mutated_configs() -> None:
    text = json.dumps(GOOD).encode()
    source = random.Random(21)
    for _ in range(ROUNDS):
        accepted(lambda: parse_config(mutated(text, source)))


@SETTINGS
@given(text=st.binary(max_size=200) | JSON.map(lambda v: json.dumps(v).encode()))
def test_anything_as_json(text: bytes) -> None:
    value = accepted(lambda: parse_json(text, what="x", code="CFG-JSON"))
    if value is not None:
        assert value == json.loads(text)


@pytest.fixture
def index_folder(tmp_path: Path) -> Path:
    for name in ("m-1.safetensors", "m-2.safetensors"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


INDEX = {
    "metadata": {"total_size": 10},
    "weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-1.safetensors"},
}


def read_index(folder: Path, text: bytes) -> None:
    (folder / INDEX_NAME).write_bytes(text)
    with open_folder(folder) as opened:
        weights = accepted(lambda: find_weight_files(opened))
    if weights is not None:
        assert all(os.sep not in name and name.endswith(".safetensors") for name in weights.files)
        found = [TensorInfo("a", "U8", (1,), "m-1.safetensors", 0, 1)]
        accepted(lambda: check_against_index(found, weights.promised))


def test_mutated_indexes(index_folder: Path) -> None:
    text = json.dumps(INDEX).encode()
    source = random.Random(22)
    for _ in range(ROUNDS):
        read_index(index_folder, mutated(text, source))


@SETTINGS
@given(key=st.text(max_size=8), value=JSON, whole=st.booleans())
def test_any_index(index_folder: Path, key: str, value: Any, whole: bool) -> None:
    index = {**INDEX, "weight_map": value} if whole else {**INDEX, "weight_map": {key: value}}
    read_index(index_folder, json.dumps(index).encode())
