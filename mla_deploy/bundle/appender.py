"""Appending to a file: small ones as ever, what is beyond a size past the page cache.

A write past the page cache comes from aligned memory, is a whole number of aligned blocks and
begins at one. So bytes are gathered in a buffer of such blocks; the file's last, incomplete one is
written as ever.
"""

from __future__ import annotations

import contextlib
import errno
import mmap

from mla_deploy.bundle.filesystem import FileSystem

_CACHED_BYTES = 256 << 20  # a small model is read again at once: let it stay in the cache
_BUFFER_BYTES = 8 << 20
_ALIGNMENT = 4096
_MAX_WRITE_BYTES = 64 << 20


class Appender:
    """Writes all it is given, by a file's descriptor, which stays the caller's."""

    def __init__(self, fs: FileSystem, descriptor: int) -> None:
        self._fs = fs
        self._descriptor = descriptor
        self._written = 0
        self._limit: int | None = _CACHED_BYTES  # of the page cache; None: no end to it
        self._memory: mmap.mmap | None = None
        self._filled = 0
        self._is_direct = False

    def append(self, view: memoryview) -> None:
        """Raises: OSError."""
        if self._memory is None:
            room = len(view) if self._limit is None else self._limit - self._written
            self._write(view[:room])
            view = view[room:]
            if not len(view):
                return
            self._is_direct = self._fs.bypass_cache(self._descriptor, on=True)
            if not self._is_direct:
                self._limit = None
                self._write(view)
                return
            self._memory = mmap.mmap(-1, _BUFFER_BYTES)
        while len(view):
            piece = view[: _BUFFER_BYTES - self._filled]
            self._memory[self._filled : self._filled + len(piece)] = piece
            self._filled += len(piece)
            view = view[len(piece) :]
            if self._filled == _BUFFER_BYTES:
                self._flush(_BUFFER_BYTES)
                self._filled = 0

    def finish(self) -> None:
        """Write what was gathered. Raises: OSError."""
        if self._memory is not None:
            whole = self._filled // _ALIGNMENT * _ALIGNMENT
            self._flush(whole)
            self._use_cache()
            self._flush(self._filled, start=whole)
            self._filled = 0

    def close(self) -> None:
        """Let the buffer go; what is in it is lost."""
        memory, self._memory = self._memory, None
        if memory is not None:
            # After a write that failed its traceback still holds the view: it goes with that.
            with contextlib.suppress(BufferError):
                memory.close()

    def _flush(self, stop: int, start: int = 0) -> None:
        if self._memory is None:
            return
        before = self._written - start
        with memoryview(self._memory) as gathered:
            try:
                self._write(gathered[start:stop])
            except OSError as error:
                if error.errno != errno.EINVAL or not self._is_direct:
                    raise
                self._use_cache()  # this file system said yes and means no
                self._write(gathered[self._written - before : stop])

    def _use_cache(self) -> None:
        self._fs.bypass_cache(self._descriptor, on=False)
        self._is_direct = False

    def _write(self, view: memoryview) -> None:
        while len(view):
            count = self._fs.write(self._descriptor, view[:_MAX_WRITE_BYTES])
            self._written += count
            view = view[count:]
