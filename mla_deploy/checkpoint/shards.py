"""Open weight files: bytes by position, from the very files whose headers were checked."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict

from mla_deploy.door import Folder
from mla_deploy.errors import InputError, IntegrityError, quoted

# A process may hold about a thousand descriptors; a large model has hundreds of shards.
_MAX_OPEN = 128
# Beyond this a file's pages are not kept: they would push everything else out of the page cache,
# and to find a page for each takes the system longer than to copy what is in it.
_CACHED_BYTES = 256 << 20


class Shards:
    """Descriptors of a folder's weight files, at most `_MAX_OPEN` at a time."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._open: OrderedDict[str, int] = OrderedDict()
        self._identity: dict[str, tuple[int, ...]] = {}
        self._lock = threading.Lock()

    def size(self, file: str) -> int:
        """Bytes of the file when it was first opened."""
        with self._lock:
            self._descriptor(file)
            return self._identity[file][2]

    def duplicate(self, file: str) -> int:
        """A descriptor of the file that the caller closes.

        Raises: InputError FILE-*, IntegrityError CKPT-CHANGED.
        """
        with self._lock:
            return os.dup(self._descriptor(file))

    def read_into(self, buffer: memoryview, file: str, offset: int, tensor: str) -> None:
        """Fill `buffer` from byte `offset`.

        Raises: InputError CKPT-TRUNCATED, IntegrityError CKPT-CHANGED.
        """
        descriptor = self.duplicate(file)
        try:
            done = 0
            while done < len(buffer):
                count = os.preadv(descriptor, [buffer[done:]], offset + done)
                if not count:
                    raise InputError(
                        "CKPT-TRUNCATED",
                        f"{quoted(file)} ends inside tensor {quoted(tensor)}: it was cut short "
                        "after it was opened",
                        hint="do not write to a checkpoint while it is being read",
                        tensor=tensor,
                        file=file,
                    )
                done += count
        finally:
            os.close(descriptor)

    def read_once_into(self, buffer: memoryview, file: str, offset: int, tensor: str) -> None:
        """As `read_into`, of bytes that nobody needs again soon: a large file's leave the cache."""
        self.read_into(buffer, file, offset, tensor)
        advise = getattr(os, "posix_fadvise", None)
        if advise is None or self.size(file) <= _CACHED_BYTES:
            return
        descriptor = self.duplicate(file)
        try:
            # The page that the next bytes begin in is read again: only whole ones go.
            advise(descriptor, offset, len(buffer), os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Close every descriptor."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    def _descriptor(self, file: str) -> int:
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        descriptor = self._folder.open(file, "checkpoint")
        found = os.fstat(descriptor)
        identity = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        if self._identity.setdefault(file, identity) != identity:
            os.close(descriptor)
            raise IntegrityError(
                "CKPT-CHANGED",
                f"{quoted(file)} is not the file whose header was checked",
                hint="do not write to a checkpoint while it is being read",
                file=file,
            )
        self._open[file] = descriptor
        if len(self._open) > _MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])
        return descriptor
