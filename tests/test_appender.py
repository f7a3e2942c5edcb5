"""The streamed writer: every byte past the page cache and back in it, failures, interruptions.

Sizes are shrunk so that a few kilobytes do what gigabytes do: beyond `_CACHED_BYTES` a file is
written in whole aligned blocks from a buffer, the last, incomplete one as ever.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mla_deploy.bundle import appender, stage_bundle
from mla_deploy.bundle.appender import Appender
from mla_deploy.bundle.filesystem import FileSystem
from mla_deploy.errors import EnvironmentFailure

PAGE = 4096


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(appender, "_CACHED_BYTES", 3 * PAGE)
    monkeypatch.setattr(appender, "_BUFFER_BYTES", 2 * PAGE)
    monkeypatch.setattr(appender, "_MAX_WRITE_BYTES", PAGE)


class Disk(FileSystem):
    """Records each write; `direct` says whether the file system knows how to go past the cache.

    `act` is called with the number of each write before it is done.
    """

    def __init__(self, direct: bool = True, act: Callable[[int], None] = lambda _: None) -> None:
        self.direct = direct
        self.act = act
        self.is_direct = False
        self.writes: list[tuple[bool, int, int]] = []  # past the cache, place in the file, size

    def bypass_cache(self, descriptor: int, *, on: bool) -> bool:
        self.is_direct = on and self.direct
        return self.is_direct

    def write(self, descriptor: int, data: memoryview) -> int:
        number = len(self.writes)
        self.writes.append((self.is_direct, os.lseek(descriptor, 0, os.SEEK_CUR), len(data)))
        self.act(number)
        return super().write(descriptor, data)


def content(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


def appended(path: Path, disk: Disk, data: bytes, pieces: int) -> bytes:
    """`data` written in `pieces` parts of unlike sizes; what stands in the file."""
    cuts = sorted(np.random.default_rng(pieces).integers(0, len(data) + 1, pieces - 1).tolist())
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    out = Appender(disk, descriptor)
    try:
        for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True):
            out.append(memoryview(data)[start:stop])
        out.finish()
    finally:
        out.close()
        os.close(descriptor)
    return path.read_bytes()


SIZES = (
    0,
    1,
    3 * PAGE - 1,
    3 * PAGE,
    3 * PAGE + 1,
    4 * PAGE,
    5 * PAGE,
    5 * PAGE + 7,
    12 * PAGE + 9,
)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pieces", [1, 7])
@pytest.mark.parametrize("direct", [True, False])
def test_every_byte_is_there(tmp_path: Path, size: int, pieces: int, direct: bool) -> None:
    disk, data = Disk(direct), content(size)
    assert appended(tmp_path / "file", disk, data, pieces) == data
    past = [write for write in disk.writes if write[0]]
    assert bool(past) == (direct and size >= 4 * PAGE)
    for _, place, count in past:
        assert (place % PAGE, count % PAGE) == (0, 0)


@pytest.mark.parametrize("size", SIZES)
def test_on_the_disk_of_this_machine(tmp_path: Path, size: int) -> None:
    """With real writes past the cache, where it has them."""
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    out, data = Appender(FileSystem(), descriptor), content(size)
    for start in range(0, size, 999):
        out.append(memoryview(data)[start : start + 999])
    out.finish()
    out.close()
    os.close(descriptor)
    assert (tmp_path / "file").read_bytes() == data


def refuse(disk: Disk, number: int) -> Callable[[int], None]:
    def act(now: int) -> None:
        if disk.is_direct and now >= number:
            raise OSError(errno.EINVAL, "not aligned to my liking")

    return act


@pytest.mark.parametrize("number", [0, 4, 6])
def test_a_file_system_that_says_yes_and_means_no(tmp_path: Path, number: int) -> None:
    """It takes the flag and refuses the write: the rest goes through the cache, nothing twice."""
    disk, data = Disk(), content(12 * PAGE + 9)
    disk.act = refuse(disk, number)
    assert appended(tmp_path / "file", disk, data, 3) == data


def test_short_writes_go_on_where_they_ended(tmp_path: Path) -> None:
    class Short(Disk):
        def write(self, descriptor: int, data: memoryview) -> int:
            part = data[: max(PAGE, len(data) // 2)] if self.is_direct else data[:100]
            return super().write(descriptor, part)

    data = content(9 * PAGE + 5)
    assert appended(tmp_path / "file", Short(direct=False), data, 2) == data
    assert appended(tmp_path / "other", Short(), data, 2) == data


# As a part of a stage


def test_digest_is_of_what_stands_on_the_disk(tmp_path: Path) -> None:
    data = content(12 * PAGE + 9)
    with stage_bundle(tmp_path / "out") as stage:
        with stage.create("weights.safetensors") as file:
            for start in range(0, len(data), 3001):
                file.write(data[start : start + 3001])
        record = stage._records["weights.safetensors"]
        written = (stage.path / "weights.safetensors").read_bytes()
    assert written == data
    assert (record.bytes, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def failing(error: BaseException, number: int) -> Disk:
    def act(now: int) -> None:
        if now == number:
            raise error

    return Disk(act=act)


# The writes of 12 pages and 9 bytes: three within the cache's part, then those of the buffer, then
# the incomplete block when the file is closed.
@pytest.mark.parametrize("number", [0, 2, 3, 5, 8, 11])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_write(tmp_path: Path, number: int, code: int) -> None:
    disk = failing(OSError(code, os.strerror(code)), number)
    with (
        pytest.raises(EnvironmentFailure) as caught,
        stage_bundle(tmp_path / "out", fs=disk) as stage,
        stage.create("weights.safetensors") as file,
    ):
        file.write(content(12 * PAGE + 9))
    assert caught.value.code == ("ENV-DISK" if code == errno.ENOSPC else "ENV-IO")
    assert len(disk.writes) == number + 1, "written on after a failure"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [0, 3, 8, 11])
def test_an_interruption(tmp_path: Path, number: int) -> None:
    disk = failing(KeyboardInterrupt(), number)
    with (
        pytest.raises(KeyboardInterrupt),
        stage_bundle(tmp_path / "out", fs=disk) as stage,
        stage.create("weights.safetensors") as file,
    ):
        file.write(content(12 * PAGE + 9))
    assert list(tmp_path.iterdir()) == []


def test_a_write_after_one_that_failed_does_not_heal_the_file(tmp_path: Path) -> None:
    """What it lacks it lacks, so it cannot be closed as if it were whole."""
    disk = failing(OSError(errno.EIO, "bad sector"), 1)
    with stage_bundle(tmp_path / "out", fs=disk) as stage:
        file = stage.create("weights.safetensors")
        with pytest.raises(EnvironmentFailure):
            file.write(content(8000))
        file.write(content(10))
        with pytest.raises(RuntimeError, match="cannot be kept"):
            file.close()
    assert list(tmp_path.iterdir()) == []
