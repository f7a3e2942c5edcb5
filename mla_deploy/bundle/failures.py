"""What an operating system error means to the user, and how a clean-up survives Ctrl-C."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mla_deploy.errors import EnvironmentFailure, quoted

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ATTEMPTS = 3
_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)


def finish(action: Callable[[], None]) -> None:
    """Run a repeatable clean-up to its end: past a passing error, and past an impatient Ctrl-C.

    The interrupt is raised again afterwards. What fails three times is left undone.
    """
    interrupt: BaseException | None = None
    for _ in range(_ATTEMPTS):
        try:
            action()
            break
        except OSError:
            continue
        except (KeyboardInterrupt, SystemExit) as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


@contextmanager
def as_failures(target: Path) -> Iterator[None]:
    """Around our own disk calls for the output `target`: every OSError becomes a failure.

    Raises: EnvironmentFailure ENV-DISK, ENV-PERMISSION, ENV-IO.
    """
    try:
        yield
    except OSError as error:
        raise failure_of(error, target) from error


@contextmanager
def disk_failures(target: Path) -> Iterator[None]:
    """Around the caller's work: only a full disk and exhausted memory are ours to name.

    Raises: EnvironmentFailure ENV-DISK, ENV-MEMORY.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise failure_of(error, target) from error
    except MemoryError as error:
        raise EnvironmentFailure(
            "ENV-MEMORY",
            f"out of memory while writing {quoted(target)}",
            hint="free memory, or use a machine with more",
        ) from error


def failure_of(error: OSError, target: Path) -> EnvironmentFailure:
    """The failure that an OSError of a disk call is."""
    reason = error.strerror or str(error)
    if error.errno in _DISK:
        return disk_failure(target, reason)
    if error.errno in _PERMISSION:
        return EnvironmentFailure(
            "ENV-PERMISSION",
            f"cannot write {quoted(target)}: {reason}",
            hint="choose a folder that you may write to",
        )
    return EnvironmentFailure(
        "ENV-IO",
        f"writing {quoted(target)} failed: {reason}",
        hint="look at the kernel log (dmesg) for what the device reported",
    )


def disk_failure(target: Path, reason: str, **details: int) -> EnvironmentFailure:
    """The failure that is a full disk, a quota or a file size limit."""
    return EnvironmentFailure(
        "ENV-DISK",
        f"no room for {quoted(target)}: {reason}",
        hint="free space, raise the limit, or choose another disk; nothing was left behind",
        **details,
    )
