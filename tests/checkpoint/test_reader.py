"""Reading: the right bytes, only those bytes, and files that change underneath."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mla_deploy.checkpoint import open_checkpoint, shards
from mla_deploy.errors import InputError, IntegrityError
from tests.checkpoint.edits import WEIGHTS, edit_weights
from tests.tiny import write_tiny

NAME = "model.layers.1.self_attn.kv_b_proj.weight"  # [64, 16]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_tensor_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    write_tiny(tmp_path, dtype=dtype)
    good = load_file(tmp_path / WEIGHTS)
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == set(good)
        assert checkpoint.total_bytes == sum(value.nbytes for value in good.values())
        for name, value in good.items():
            found = checkpoint.read(name)
            assert found.dtype == value.dtype
            assert torch.equal(found, value)


def test_parts_of_a_tensor(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    fused = torch.randn(3, 10, 4, 2)
    edit_weights(tmp_path, lambda tensors: tensors.update({"x": fused}))
    with open_checkpoint(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.read("x", index=2), fused[2])
        assert torch.equal(checkpoint.read("x", rows=slice(1, 3)), fused[1:3])
        assert torch.equal(checkpoint.read("x", rows=slice(5, 10), index=1), fused[1, 5:10])
        assert torch.equal(checkpoint.read("x", rows=slice(None, 4), index=0), fused[0, :4])


@pytest.mark.parametrize(
    ("rows", "index"),
    [(slice(0, 65), None), (slice(3, 3), None), (slice(5, 2), None), (slice(-2, 4), None),
     (slice(0, 8, 2), None), (None, 64), (None, -1), (slice(0, 17), 0)],
)  # fmt: skip
def test_parts_outside_a_tensor(tmp_path: Path, rows: slice | None, index: int | None) -> None:
    with open_checkpoint(write_tiny(tmp_path)) as checkpoint:
        with pytest.raises(InputError) as caught:
            checkpoint.read(NAME, rows=rows, index=index)
        assert caught.value.code == "CKPT-SLICE"


def test_only_the_bytes_asked_for_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    preadv = os.preadv

    def counting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        done.append(preadv(descriptor, buffers, offset))
        return done[-1]

    with open_checkpoint(write_tiny(tmp_path)) as checkpoint:
        monkeypatch.setattr(os, "preadv", counting)
        checkpoint.read(NAME, rows=slice(3, 5))
        assert sum(done) == 2 * 16 * 4
        checkpoint.read(NAME, index=7)
        assert sum(done) == 2 * 16 * 4 + 16 * 4


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network filesystem may return less than was asked for."""
    preadv = os.preadv
    good = load_file(write_tiny(tmp_path) / WEIGHTS)[NAME]
    with open_checkpoint(tmp_path) as checkpoint:
        monkeypatch.setattr(os, "preadv", lambda fd, b, at: preadv(fd, [b[0][:13]], at))
        assert torch.equal(checkpoint.read(NAME), good)


def test_an_unknown_name(tmp_path: Path) -> None:
    with open_checkpoint(write_tiny(tmp_path)) as checkpoint:
        with pytest.raises(InputError) as caught:
            checkpoint.read("model.nothing")
        assert caught.value.code == "CKPT-MISSING"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_bad_value_anywhere(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    """At the start, inside a vector register, in the tail, among huge finite values."""
    write_tiny(tmp_path)
    largest = torch.finfo(dtype).max
    names = []
    tensors = {}
    for size in (1, 7, 64, 1000):
        for place in sorted({0, size // 2, size - 1}):
            value = torch.full((size,), largest, dtype=dtype)
            value[::2] = -largest
            tensors[f"good.{size}.{place}"] = value.clone()
            value[place] = bad
            names.append(f"bad.{size}.{place}")
            tensors[names[-1]] = value
    edit_weights(tmp_path, lambda all_tensors: all_tensors.update(tensors))
    with open_checkpoint(tmp_path) as checkpoint:
        for name in names:
            with pytest.raises(InputError) as caught:
                checkpoint.read(name)
            assert caught.value.code == "CKPT-NONFINITE"
            assert name in caught.value.message
            checkpoint.read(name.replace("bad", "good"))


def test_a_bad_value_outside_the_part_is_not_seen(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors[NAME].__setitem__((10, 3), float("nan")))
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.read(NAME, rows=slice(0, 10))
        with pytest.raises(InputError):
            checkpoint.read(NAME, rows=slice(10, 11))


def test_digest_follows_content_that_headers_show(tmp_path: Path) -> None:
    def digest(folder: Path) -> str:
        with open_checkpoint(folder) as checkpoint:
            return checkpoint.digest

    first = digest(write_tiny(tmp_path / "a"))
    assert digest(write_tiny(tmp_path / "b")) == first
    assert digest(write_tiny(tmp_path / "c", dtype="bfloat16")) != first
    assert digest(write_tiny(tmp_path / "d", rms_norm_eps=1e-5)) != first
    assert digest(write_tiny(tmp_path / "e", max_shard_size="60KB")) != first


def test_shards_beyond_the_open_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_MAX_OPEN", 2)
    whole = load_file(write_tiny(tmp_path / "whole") / WEIGHTS)
    write_tiny(tmp_path / "many", max_shard_size="30KB")
    before = len(os.listdir("/proc/self/fd"))
    with open_checkpoint(tmp_path / "many") as checkpoint:
        assert len(checkpoint.files) > 4
        for name, value in whole.items():
            assert torch.equal(checkpoint.read(name), value)
        assert len(os.listdir("/proc/self/fd")) <= before + 3
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_shard_replaced_between_two_openings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_MAX_OPEN", 1)
    write_tiny(tmp_path, max_shard_size="60KB")
    with open_checkpoint(tmp_path) as checkpoint:
        first, *_, last = checkpoint.files
        checkpoint.read(next(i.name for i in checkpoint.tensors.values() if i.file == last))
        content = (tmp_path / first).read_bytes()
        (tmp_path / "other").write_bytes(content)
        (tmp_path / "other").replace(tmp_path / first)
        with pytest.raises(IntegrityError) as caught:
            checkpoint.read(next(i.name for i in checkpoint.tensors.values() if i.file == first))
    assert (caught.value.code, caught.value.exit_status) == ("CKPT-CHANGED", 5)


def test_threads_share_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_MAX_OPEN", 2)
    whole = load_file(write_tiny(tmp_path / "whole") / WEIGHTS)
    write_tiny(tmp_path / "many", max_shard_size="30KB")
    with open_checkpoint(tmp_path / "many") as checkpoint, ThreadPoolExecutor(4) as pool:
        names = list(whole) * 3
        for name, found in zip(names, pool.map(checkpoint.read, names), strict=True):
            assert torch.equal(found, whole[name])


def test_nothing_stays_open_after_a_refusal(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    save_file({"model.layers.0.x": torch.zeros(1)}, tmp_path / WEIGHTS)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(InputError):
        open_checkpoint(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
