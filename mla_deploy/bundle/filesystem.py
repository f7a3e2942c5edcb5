"""Every call that changes the disk while a bundle is staged and published, one method each.

One object instead of loose calls, so that a test can make call k fail, or record the order. All
methods raise OSError; what it means to the user is decided in `publish.py`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from mla_deploy.door import create_file, open_folder

_AT_FDCWD = -100
_NOREPLACE = 1
_EXCHANGE = 2
# What a kernel or a file system says that does not know renameat2 or one of its flags.
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


class FileSystem:
    """The real calls."""

    def make_folder(self, path: Path) -> None:
        """A new empty folder."""
        os.mkdir(path)

    def create(self, path: Path) -> BinaryIO:
        """A new file, through the door; only its descriptor is used, its buffer stays empty."""
        return create_file(path)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write some of `data`; the count written, which may be short."""
        return os.write(descriptor, data)

    def bypass_cache(self, descriptor: int, *, on: bool) -> bool:
        """Whether what is written from now on goes past the page cache, in whole aligned blocks.

        A file of tens of gigabytes would push everything else out of the cache, and on some systems
        each page of it costs more than the disk does.
        """
        direct = getattr(os, "O_DIRECT", 0)
        try:
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | direct if on else flags & ~direct)
        except OSError:
            return False  # a file system that has no such thing
        return on and bool(direct)

    def sync(self, descriptor: int) -> None:
        """The file's bytes are on the disk when this returns."""
        os.fsync(descriptor)

    def close(self, file: BinaryIO) -> None:
        """Close a file made by `create`."""
        file.close()

    def sync_folder(self, path: Path) -> None:
        """The folder's entries are on the disk when this returns."""
        with open_folder(path) as folder:
            os.fsync(folder.fileno())

    def rename_new(self, source: Path, target: Path) -> None:
        """Rename in one step; FileExistsError when anything stands at `target`.

        Without renameat2 this looks first and renames then: our own writers are kept apart by the
        output's lock, another program in that gap is not (and can lose an empty folder at most).
        """
        try:
            _renameat2(source, target, _NOREPLACE)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, "exists", str(target)) from None
            os.rename(source, target)

    def exchange(self, one: Path, other: Path) -> None:
        """Swap two names in one step; there is no stand-in where renameat2 is missing."""
        _renameat2(one, other, _EXCHANGE)

    def can_exchange(self, folder: Path) -> bool:
        """Whether names in `folder` can be swapped, tried on two new folders."""
        one, other = folder / ".exchange-a", folder / ".exchange-b"
        made = []
        try:
            for path in (one, other):
                os.mkdir(path)
                made.append(path)
            _renameat2(one, other, _EXCHANGE)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return False
            raise
        finally:
            for path in made:
                os.rmdir(path)
        return True

    def remove_file(self, path: Path) -> None:
        """Remove one file."""
        os.unlink(path)

    def remove_tree(self, path: Path) -> None:
        """Remove a folder and all in it; links in it are removed, not followed."""
        shutil.rmtree(path)

    def free_bytes(self, folder: Path) -> int:
        """Bytes that this user may still write."""
        found = os.statvfs(folder)
        return found.f_bavail * found.f_frsize


def _renameat2(source: Path, target: Path, flags: int) -> None:
    call = _renameat2_symbol()
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(target))
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


@cache
def _renameat2_symbol() -> Any | None:
    """The C library's renameat2, or None where it has none (older than glibc 2.28, not Linux)."""
    symbol = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if symbol is not None:
        symbol.argtypes = [
            ctypes.c_int,
            ctypes.c_char_p,
            ctypes.c_int,
            ctypes.c_char_p,
            ctypes.c_uint,
        ]
        symbol.restype = ctypes.c_int
    return symbol
