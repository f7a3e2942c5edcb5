"""F-CKPT 54-64: other formats, files that change while they are read, dtypes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mla_deploy.checkpoint import open_checkpoint
from tests.checkpoint.edits import INDEX, WEIGHTS, edit_weights
from tests.faults.refused import refused
from tests.tiny import write_tiny

SECOND = "model.embed_tokens.weight"


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "sharded", max_shard_size="60KB")


def opened(folder: Path) -> None:
    open_checkpoint(folder).close()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_F_CKPT_54_only_pickles(good: Path, name: str) -> None:
    (good / WEIGHTS).rename(good / name)
    refused(lambda: opened(good), "CKPT-FORMAT", name, "save_pretrained")


def test_F_CKPT_54_no_weights_at_all(good: Path) -> None:
    (good / WEIGHTS).unlink()
    refused(lambda: opened(good), "CKPT-FORMAT", "no weights")


def test_F_CKPT_54_shards_without_an_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    refused(lambda: opened(sharded), "CKPT-INDEX", INDEX)


def test_F_CKPT_55_pickle_beside_safetensors_is_a_note(good: Path) -> None:
    (good / "pytorch_model.bin").write_bytes(b"\x80\x04never opened")
    with open_checkpoint(good) as checkpoint:
        assert any("pytorch_model.bin" in note for note in checkpoint.notes)


def test_F_CKPT_56_truncated_while_open(good: Path) -> None:
    """A mapped file would end the process with SIGBUS here."""
    with open_checkpoint(good) as checkpoint:
        last = max(checkpoint.tensors.values(), key=lambda info: info.offset)
        os.truncate(good / WEIGHTS, last.offset + 1)
        refused(lambda: checkpoint.read(last.name), "CKPT-TRUNCATED", last.name)


def test_F_CKPT_57_replaced_while_open(good: Path) -> None:
    """The open file is the one whose header was checked, whatever the name leads to now."""
    import torch

    with open_checkpoint(good) as checkpoint:
        before = checkpoint.read(SECOND)
        (good / "new").write_bytes(b"another file")
        (good / "new").replace(good / WEIGHTS)
        assert torch.equal(checkpoint.read(SECOND), before)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>Not found</html>", "web page"),
        (b"\n<html><head></head></html>", "web page"),
    ],
    ids=["F_CKPT_58_lfs_pointer", "F_CKPT_58_html", "F_CKPT_58_html_after_a_line"],
)
@pytest.mark.parametrize(
    ("name", "code"),
    [(WEIGHTS, "CKPT-LFS"), ("config.json", "CFG-JSON"), (INDEX, "CKPT-INDEX")],
    ids=["weights", "config", "index"],
)
def test_stand_in_for_a_file(good: Path, content: bytes, word: str, name: str, code: str) -> None:
    (good / name).write_bytes(content)
    refused(lambda: opened(good), code, word)


@pytest.mark.parametrize("scale", [None, [1, 1], [7, 7]], ids=["none", "right", "wrong"])
def test_F_CKPT_63_64_fp8_without_a_word_in_the_config(good: Path, scale: list[int] | None) -> None:
    """Right scales do not help: nothing tells the size of their blocks."""
    import torch

    name = "model.layers.0.self_attn.kv_b_proj.weight"

    def change(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        if scale:
            tensors[f"{name}_scale_inv"] = torch.ones(scale)

    named = [name, "F8_E4M3", "quantization_config"] + (["weight_block_size"] if scale else [])
    refused(lambda: opened(edit_weights(good, change)), "CKPT-DTYPE", *named)
