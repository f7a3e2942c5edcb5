"""What a file holds, as numbers: its size, its sha256, and one sha256 per 64 MiB block.

The block list lets a check run on all cores and name the damaged block; the whole-file hash is
the one other tools (`sha256sum`) print. The two are taken in one pass while the file is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

BLOCK_BYTES = 64 << 20
_READ_BYTES = 4 << 20
_THREAD_WORTH_BYTES = 1 << 20
_MAX_THREADS = 8
_POPULATE_READ = 22  # MADV_POPULATE_READ (madvise(2), since Linux 5.14), of all architectures


@dataclass(frozen=True)
class FileRecord:
    """Size and hashes of one file; `blocks` is empty when the file fits in one block."""

    bytes: int
    sha256: str
    blocks: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The entry of the manifest's `files` section."""
        entry: dict[str, Any] = {"bytes": self.bytes, "sha256": self.sha256}
        if self.blocks:
            entry["blocks"] = list(self.blocks)
        return entry


class ContentHasher:
    """Running hashes of a stream of bytes: the whole and each block of `BLOCK_BYTES`."""

    def __init__(self) -> None:
        self.bytes = 0
        self._whole = hashlib.sha256()
        self._block = hashlib.sha256()
        self._blocks: list[str] = []
        self._threads: ThreadPoolExecutor | None = None

    def update(self, data: memoryview) -> None:
        """Take the next bytes. The two hashes run side by side when there is enough to hash."""
        self.begin(data)()

    def begin(self, data: memoryview) -> Callable[[], None]:
        """Take the next bytes; they must stay as they are until what is returned was called."""
        if len(data) < _THREAD_WORTH_BYTES:
            self._whole.update(data)
            self._update_blocks(data)
            return lambda: None
        if self._threads is None:
            self._threads = ThreadPoolExecutor(2, thread_name_prefix="mla-deploy-hash")
        begun = [
            self._threads.submit(self._whole.update, data),
            self._threads.submit(self._update_blocks, data),
        ]

        def finish() -> None:
            wait(begun)
            for future in begun:
                future.result()

        return finish

    def _update_blocks(self, data: memoryview) -> None:
        while len(data):
            piece = data[: BLOCK_BYTES - self.bytes % BLOCK_BYTES]
            self._block.update(piece)
            self.bytes += len(piece)
            data = data[len(piece) :]
            if self.bytes % BLOCK_BYTES == 0:
                self._blocks.append(self._block.hexdigest())
                self._block = hashlib.sha256()

    def record(self) -> FileRecord:
        """The record of all bytes taken so far; ends the helper threads."""
        self.stop()
        blocks = list(self._blocks)
        if self.bytes % BLOCK_BYTES:
            blocks.append(self._block.hexdigest())
        return FileRecord(
            self.bytes, self._whole.hexdigest(), tuple(blocks) if len(blocks) > 1 else ()
        )

    def stop(self) -> None:
        """End the helper threads; idempotent."""
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None


def record_of_descriptor(descriptor: int) -> FileRecord:
    """The record of an open file, read from its first byte to its last."""
    hasher = ContentHasher()
    buffer = memoryview(bytearray(_READ_BYTES))
    try:
        while count := os.preadv(descriptor, [buffer], hasher.bytes):
            hasher.update(buffer[:count])
        return hasher.record()
    finally:
        hasher.stop()


def find_damage(descriptor: int, record: FileRecord) -> str | None:
    """Compare an open file's bytes with its record: None, or what differs in words.

    A file with a block list is checked block by block, in parallel; the blocks fix every byte,
    so the whole-file hash adds nothing. The caller has compared the size.
    """
    if not record.blocks:
        found = sha256_of_range(descriptor, 0, record.bytes)
        return None if found == record.sha256 else f"sha256 is {found}, wanted {record.sha256}"
    starts = range(0, record.bytes, BLOCK_BYTES)
    threads = min(os.cpu_count() or 1, len(record.blocks), _MAX_THREADS)
    with ThreadPoolExecutor(threads, thread_name_prefix="mla-deploy-hash") as pool:
        pending = [
            pool.submit(sha256_of_range, descriptor, start, min(start + BLOCK_BYTES, record.bytes))
            for start in starts
        ]
        try:
            for index, (future, wanted) in enumerate(zip(pending, record.blocks, strict=True)):
                if future.result() != wanted:
                    return f"block {index} (bytes {starts[index]} and on) has another sha256"
        finally:
            for future in pending:
                future.cancel()
    return None


def _fetch(descriptor: int, start: int, stop: int) -> None:
    """Bring bytes [start, stop) into memory, in huge pages where the system does that for files.

    Whoever reads a file first settles how it lies in the page cache, and weights stay mapped from
    there: a decode step of m4 was seen to take 1.4 of the time over pages that `read` had brought.
    What is cached already stays as it is; where anything is not to be had, `read` will bring it.
    """
    first = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with (
        contextlib.suppress(OSError, ValueError, AttributeError),
        mmap.mmap(descriptor, stop - first, offset=first, access=mmap.ACCESS_READ) as view,
    ):
        view.madvise(mmap.MADV_HUGEPAGE)
        view.madvise(_POPULATE_READ)


def sha256_of_range(descriptor: int, start: int, stop: int) -> str:
    """sha256 of bytes [start, stop); of fewer when the file ends early."""
    hasher = hashlib.sha256()
    _fetch(descriptor, start, stop)
    buffer = memoryview(bytearray(min(_READ_BYTES, max(stop - start, 1))))
    while start < stop:
        count = os.preadv(descriptor, [buffer[: stop - start]], start)
        if count == 0:
            break
        hasher.update(buffer[:count])
        start += count
    return hasher.hexdigest()
