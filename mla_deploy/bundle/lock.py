"""One writer per output: an advisory lock on `.<name>.lock` beside it, gone when nobody holds it.

The kernel drops the lock when its holder dies, so a stray lock file means nothing. A lock file is
removed while it is held; a process that locked a removed file notices and starts over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mla_deploy.bundle.failures import finish
from mla_deploy.bundle.filesystem import FileSystem
from mla_deploy.door import open_folder
from mla_deploy.errors import BusyError, EnvironmentFailure, InputError, MlaDeployError, quoted

_ATTEMPTS = 100


@contextmanager
def output_lock(target: Path, fs: FileSystem) -> Iterator[None]:
    """Be the only writer of `target`.

    Raises: BusyError BUN-BUSY; EnvironmentFailure ENV-LOCK; OSError.
    """
    path = target.parent / f".{target.name}.lock"
    try:
        descriptor = _acquire(path, target, fs)
    except (KeyboardInterrupt, SystemExit):
        # The file may have been made already: take it away again unless somebody holds it.
        with contextlib.suppress(OSError, MlaDeployError):
            _release(_acquire(path, target, fs), path, fs)
        raise
    try:
        yield
    finally:
        _release(descriptor, path, fs)


def _release(descriptor: int, path: Path, fs: FileSystem) -> None:
    """Unlink, then unlock: nobody can lock a name that is about to vanish."""

    def unlink() -> None:
        if _is_at(path, descriptor):
            fs.remove_file(path)

    try:
        finish(unlink)
    finally:
        os.close(descriptor)


def _acquire(path: Path, target: Path, fs: FileSystem) -> int:
    for _ in range(_ATTEMPTS):
        descriptor = _open_lock_file(path, fs)
        if descriptor is None:
            continue
        try:
            _lock(descriptor, target)
            if _is_at(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise _busy(target)


def _open_lock_file(path: Path, fs: FileSystem) -> int | None:
    """A descriptor of the lock file, made when there is none; None when it vanished meanwhile."""
    try:
        file = fs.create(path)
    except BusyError:
        pass  # the file exists: somebody holds it, or died holding it
    else:
        try:
            return os.dup(file.fileno())
        finally:
            file.close()
    try:
        with open_folder(path.parent) as folder:
            # "checkpoint": a file being unlinked has 0 links, which "bundle" would refuse.
            return folder.open(path.name, "checkpoint")
    except InputError as error:
        if error.code == "FILE-MISSING":
            return None
        raise


def _lock(descriptor: int, target: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _busy(target) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise
        raise EnvironmentFailure(
            "ENV-LOCK",
            f"the file system of {quoted(target.parent)} has no file locks",
            hint="write to a local disk and copy the finished bundle",
        ) from None


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _busy(target: Path) -> BusyError:
    return BusyError(
        "BUN-BUSY",
        f"another process is writing {quoted(target)}",
        hint="wait until it is done, or choose another output",
    )
