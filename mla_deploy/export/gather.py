"""Bytes gathered into large chunks: one is written (and hashed) while the next is filled.

The chunks are the same few stretches of memory again and again. A fresh one for each tensor would
cost more than reading does: every page of it is first cleared by the system.
"""

from __future__ import annotations

import mmap
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

CHUNK_BYTES = 32 << 20
_CHUNKS = 3  # one is filled, one is written, one is ready


class Writable(Protocol):
    """Where the bytes go."""

    def write(self, data: bytes | memoryview, /) -> int: ...


class Gather:
    """A context manager: nothing is being written any more when its block is left.

    Bytes go out in the order in which they came in; `finish` says that there are no more.
    """

    def __init__(self, stream: Writable) -> None:
        self._stream = stream
        self._chunks = [mmap.mmap(-1, CHUNK_BYTES) for _ in range(_CHUNKS)]
        self._written: list[Future[int] | None] = [None] * _CHUNKS
        self._current = 0
        self._filled = 0
        self._scratch: mmap.mmap | None = None
        self._is_broken = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mla-deploy-write")

    def room(self, most: int) -> memoryview:
        """Memory for the next bytes, 1 to `most` of them; `take` counts them once they are there.

        Raises: what the stream raised when it wrote an earlier chunk.
        """
        if self._filled == CHUNK_BYTES:
            self._hand_over()
        return memoryview(self._chunks[self._current])[self._filled : self._filled + most]

    def take(self, count: int) -> None:
        """The first `count` bytes of the room are the next ones."""
        self._filled += count

    def put(self, data: memoryview) -> None:
        """Take a copy of `data`. Raises: as `room`."""
        while len(data):
            room = self.room(len(data))
            room[:] = data[: len(room)]
            self.take(len(room))
            data = data[len(room) :]

    def scratch(self, count: int) -> memoryview:
        """Memory for values that are converted on their way; the same at every call."""
        if self._scratch is None:
            self._scratch = mmap.mmap(-1, CHUNK_BYTES)
        return memoryview(self._scratch)[:count]

    def finish(self) -> None:
        """Write what was gathered; all is written when this returns. Raises: as `room`."""
        self._hand_over()
        for written in self._written:
            if written is not None:
                written.result()

    def _hand_over(self) -> None:
        if self._filled:
            full = memoryview(self._chunks[self._current])[: self._filled]
            self._written[self._current] = self._thread.submit(self._write, full)
        self._current = (self._current + 1) % _CHUNKS
        self._filled = 0
        before = self._written[self._current]
        if before is not None:
            before.result()

    def _write(self, full: memoryview) -> int:
        """In the thread. After a write that failed there is no other: it would leave a hole."""
        if self._is_broken:
            return 0
        self._is_broken = True
        count = self._stream.write(full)
        self._is_broken = False
        return count

    def __enter__(self) -> Gather:
        return self

    def __exit__(self, *_: object) -> None:
        # Nobody may close the stream meanwhile; after an error the chunks that wait are dropped.
        self._thread.shutdown(cancel_futures=True)
