"""One file of a stage: written in pieces, hashed on the way, synced when it is closed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from mla_deploy.bundle.appender import Appender
from mla_deploy.bundle.content import ContentHasher, FileRecord
from mla_deploy.bundle.failures import as_failures
from mla_deploy.bundle.filesystem import FileSystem


class StagedFile:
    """A file being written: `write` any number of times, then `close` (or leave the block).

    Bytes are hashed while they are written. Closing syncs them to the disk and keeps the record;
    leaving the block by an exception closes without keeping anything.
    """

    def __init__(
        self,
        file: BinaryIO,
        fs: FileSystem,
        target: Path,
        keep: Callable[[FileRecord], None],
    ) -> None:
        self._file = file
        self._fs = fs
        self._target = target
        self._keep = keep
        self._hasher = ContentHasher()
        self._out = Appender(fs, file.fileno())
        self._closed = False
        self._whole = True

    def write(self, data: Any) -> int:
        """Append `data` (any contiguous buffer); all of it is written when this returns.

        Raises: EnvironmentFailure ENV-DISK, ENV-IO.
        """
        if self._closed:
            raise ValueError("write to a closed file of a stage")
        view = memoryview(data).cast("B")
        count = len(view)
        with as_failures(self._target):
            was_whole, self._whole = self._whole, False
            hashed = self._hasher.begin(view)
            try:
                self._out.append(view)
            finally:
                hashed()  # the caller may change its buffer as soon as we return
            self._whole = was_whole  # what an earlier write left out stays left out
        return count

    def tell(self) -> int:
        """Bytes written so far."""
        return self._hasher.bytes

    def flush(self) -> None:
        """Nothing to do before the end; here for libraries that flush what they write to."""

    def close(self) -> None:
        """Sync, close and keep the file; closing twice is allowed. Raises as `write`."""
        if self._closed:
            return
        try:
            with as_failures(self._target):
                if not self._whole:
                    raise RuntimeError("a write to this file failed, it cannot be kept")
                self._out.finish()
                self._fs.sync(self._file.fileno())
                self._closed = True
                self._fs.close(self._file)
        except BaseException:
            self.abandon()
            raise
        self._out.close()
        self._keep(self._hasher.record())

    def abandon(self) -> None:
        """Close without keeping the file."""
        self._closed = True
        self._hasher.stop()
        self._out.close()
        with contextlib.suppress(OSError):
            self._file.close()

    def __enter__(self) -> StagedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()
