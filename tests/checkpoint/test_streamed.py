"""Reading in passing: the same bytes, into given memory, and large files leave the cache."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mla_deploy.checkpoint import Checkpoint, open_checkpoint, shards
from mla_deploy.errors import InputError
from tests.checkpoint import quantizers
from tests.tiny import write_preset

NAME = "model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_preset(tmp_path / "c", "v2")


def whole(checkpoint: Checkpoint) -> torch.Tensor:
    return checkpoint.read(NAME).flatten()


def test_values_lie_where_they_were_wanted(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        memory = bytearray(5 * 4)
        found = checkpoint.read_stored(NAME, 7, (5,), memoryview(memory))
        assert torch.equal(found, whole(checkpoint)[7:12])
        assert torch.equal(torch.frombuffer(memory, dtype=torch.float32), found)
        assert torch.equal(checkpoint.read_stored(NAME, 7, (5,)), found)


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (1 << 40, 1), (0, 1 << 40)])
def test_outside_of_the_tensor(folder: Path, first: int, count: int) -> None:
    with (
        open_checkpoint(folder) as checkpoint,
        pytest.raises(InputError, match="outside") as caught,
    ):
        checkpoint.read_stored(NAME, first, (count,))
    assert caught.value.code == "CKPT-SLICE"


def test_no_such_tensor(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint, pytest.raises(InputError) as caught:
        checkpoint.read_stored("nothing", 0, (1,))
    assert caught.value.code == "CKPT-MISSING"


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_among_eight_bits(folder: Path, code: int) -> None:
    quantizers.quantize_folder(
        folder, quantizers.fp8_blocks, quantizers.FP8_CONFIG, quantizers.is_linear
    )
    path = folder / "model.safetensors"
    with open_checkpoint(folder) as checkpoint:
        info = next(i for i in checkpoint.stored.values() if i.dtype == "F8_E4M3")
        assert checkpoint.read_stored(info.name, 0, (9,)).dtype is torch.float8_e4m3fn
        with path.open("r+b") as file:
            os.pwrite(file.fileno(), bytes([code]), info.offset + 8)
        checkpoint.read_stored(info.name, 0, (8,))
        with pytest.raises(InputError, match="holds nan") as caught:
            checkpoint.read_stored(info.name, 0, (9,))
    assert caught.value.code == "CKPT-NONFINITE"


def test_only_what_was_streamed_of_a_large_file_leaves_the_cache(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int, int]] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, offset, size, advice: told.append((offset, size, advice))
    )
    with open_checkpoint(folder) as checkpoint:
        memory = memoryview(bytearray(20))
        checkpoint.read_stored(NAME, 3, (5,), memory)
        assert told == []  # small
        monkeypatch.setattr(shards, "_CACHED_BYTES", 1000)
        checkpoint.read_stored(NAME, 3, (5,))
        checkpoint.read(NAME)
        assert told == []  # for someone who may read it again
        checkpoint.read_stored(NAME, 3, (5,), memory)
        start = checkpoint.stored[NAME].offset + 3 * 4
        assert told == [(start, 20, os.POSIX_FADV_DONTNEED)]


def test_a_system_without_such_advice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise")
    monkeypatch.setattr(shards, "_CACHED_BYTES", 1000)
    with open_checkpoint(folder) as checkpoint:
        found = checkpoint.read_stored(NAME, 0, (5,), memoryview(bytearray(20)))
        assert torch.equal(found, whole(checkpoint)[:5])
