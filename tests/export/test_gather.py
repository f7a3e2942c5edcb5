"""Bytes gathered into chunks: all of them, in order, and what the stream raises is raised."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from mla_deploy.export import gather
from mla_deploy.export.gather import Gather


class Stream:
    """Takes bytes slowly; `fails` counts down to the write that fails."""

    def __init__(self, fails: int = -1) -> None:
        self.data = bytearray()
        self.sizes: list[int] = []
        self.busy = 0
        self._fails = fails

    def write(self, data: bytes | memoryview, /) -> int:
        self.busy += 1
        before = bytes(data)
        time.sleep(0.002)
        assert bytes(data) == before, "the chunk was filled again while it was written"
        self._fails -= 1
        self.busy -= 1
        if self._fails == -1:
            raise OSError(28, "no space")
        self.data += data
        self.sizes.append(len(data))
        return len(data)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "CHUNK_BYTES", 64)


def pieces(count: int, seed: int = 0) -> list[bytes]:
    random = np.random.default_rng(seed)
    return [random.bytes(int(size)) for size in random.integers(0, 150, count)]


def test_all_bytes_in_order() -> None:
    stream, wanted = Stream(), pieces(30)
    with Gather(stream) as gathered:
        for piece in wanted:
            gathered.put(memoryview(piece))
        gathered.finish()
    assert bytes(stream.data) == b"".join(wanted)
    assert set(stream.sizes[:-1]) == {64} and 0 < stream.sizes[-1] <= 64


def test_room_is_written_where_it_lies() -> None:
    stream = Stream()
    with Gather(stream) as gathered:
        room = gathered.room(40)
        assert len(room) == 40
        room[:] = b"a" * 40
        gathered.take(40)
        room = gathered.room(40)
        assert len(room) == 24  # as much as is left of the chunk
        room[:] = b"b" * 24
        gathered.take(24)
        gathered.finish()
    assert bytes(stream.data) == b"a" * 40 + b"b" * 24


def test_nothing_gathered_is_nothing_written() -> None:
    stream = Stream()
    with Gather(stream) as gathered:
        gathered.finish()
    assert stream.sizes == []


@pytest.mark.parametrize("fails", [0, 1, 4, 9])
def test_a_failing_write_is_raised(fails: int) -> None:
    """In one of the next calls, or at the end: never lost."""
    stream = Stream(fails)
    with pytest.raises(OSError, match="no space"), Gather(stream) as gathered:
        for _ in range(10):
            gathered.put(memoryview(b"x" * 64))
        gathered.finish()
    assert stream.busy == 0
    assert len(stream.data) == fails * 64


@pytest.mark.parametrize("problem", [ValueError, KeyboardInterrupt])
def test_an_interruption_waits_for_the_write_that_has_begun(problem: Any) -> None:
    stream = Stream()
    with pytest.raises(problem), Gather(stream) as gathered:
        for _ in range(3):
            gathered.put(memoryview(b"x" * 64))
        raise problem
    assert stream.busy == 0
    sizes = list(stream.sizes)
    time.sleep(0.02)
    assert stream.sizes == sizes, "written after the block was left"
    assert not [t for t in threading.enumerate() if t.name.startswith("mla-deploy-write")]
