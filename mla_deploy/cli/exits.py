"""Exit codes: every way a command can end, as one error of our family."""

from __future__ import annotations

import errno
import os
import re
import tempfile
import traceback

import click

from mla_deploy.errors import EnvironmentFailure, MlaDeployError, quoted

BROKEN_PIPE = 141
TABLE = {
    0: "done, and verified",
    1: "our bug: an unexpected exception; its traceback is in a file whose path is printed",
    2: "usage: an option or argument is wrong",
    3: "the answer is no: a parity or memory gate was not met",
    4: "bad input: a malformed, unsafe, contradictory or unsupported checkpoint, bundle or prompt",
    5: "integrity: hash mismatch, missing or extra file, stale mix",
    6: "incompatible: made for another format version, device, runtime or opset",
    7: "environment: disk full, out of memory, no permission, missing library",
    8: "busy or exists: another process holds the output, or it is there and `--replace` is not",
    130: "Ctrl-C; cleaned up",
    141: "the reader of our output went away (as in `mla-deploy inspect x | head -1`)",
    143: "SIGTERM; cleaned up",
}
_REPORTS = "please report it with that file: it holds the traceback and no weights"


class UsageRefusal(MlaDeployError):
    """The command line itself is wrong (click's exit status)."""

    exit_status = 2


class Interrupted(MlaDeployError):
    """Ctrl-C; what was staged has been removed."""

    exit_status = 130


class Terminated(MlaDeployError):
    """SIGTERM; what was staged has been removed."""

    exit_status = 143


class Bug(MlaDeployError):
    """An exception nobody planned."""

    exit_status = 1


def error_from(problem: BaseException) -> MlaDeployError:
    """`problem` as one of ours. An unplanned exception becomes CLI-BUG, its traceback in a file."""
    if isinstance(problem, MlaDeployError):
        return problem
    if isinstance(problem, click.ClickException):
        return _usage_error(problem)
    if isinstance(problem, (MemoryError, OSError, ImportError, RuntimeError)):
        known = _environment_error(problem)
        if known is not None:
            return known
    return _bug(problem)


def _usage_error(problem: click.ClickException) -> MlaDeployError:
    context = getattr(problem, "ctx", None)
    command = context.command_path if context is not None else "mla-deploy"
    return UsageRefusal(
        "CLI-USAGE", problem.format_message(), hint=f"`{command} --help` lists what it takes"
    )


_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_RESOURCE = {errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM, errno.EAGAIN}
# What torch and onnxruntime say, in a RuntimeError, when an allocation fails.
_ALLOCATION = re.compile(r"can't allocate memory|bad_alloc|[Ff]ailed to allocate memory")


def _environment_error(problem: Exception) -> MlaDeployError | None:
    if isinstance(problem, MemoryError) or _ALLOCATION.search(str(problem)):
        return EnvironmentFailure(
            "ENV-MEMORY",
            "the machine ran out of memory",
            hint="close other programs, or choose a smaller --capacity or --dtype",
        )
    if isinstance(problem, ImportError):
        return _missing_library(problem)
    if not isinstance(problem, OSError):
        return None
    number = problem.errno
    place = f" at {quoted(problem.filename)}" if problem.filename else ""
    if number in _NO_SPACE:
        return EnvironmentFailure(
            "ENV-DISK",
            f"no space left to write{place}",
            hint="free some space, or choose an --out on another disk; nothing was left behind",
        )
    if number in _NO_ACCESS:
        return EnvironmentFailure(
            "ENV-PERMISSION",
            f"not allowed{place}: {os.strerror(number)}",
            hint="check the owner and mode of that folder",
        )
    if number is not None and number in _NO_RESOURCE:
        return EnvironmentFailure(
            "ENV-IO",
            f"the system refused{place}: {os.strerror(number)}",
            hint="see `dmesg` and `ulimit -a`; then run the command again",
        )
    return None


def _missing_library(problem: ImportError) -> MlaDeployError | None:
    library = (problem.name or "").partition(".")[0]
    if not library or library == "mla_deploy":
        return None  # a broken import of our own is a bug
    return EnvironmentFailure(
        "ENV-LIBRARY",
        f"the library {quoted(library)} cannot be imported: {quoted(problem)}",
        hint="install mla-deploy again in this environment; `mla-deploy doctor` checks it",
        library=library,
    )


def _bug(problem: BaseException) -> MlaDeployError:
    text = "".join(traceback.format_exception(problem))
    told = f"{type(problem).__name__}: {str(problem)[:200]}"
    try:
        handle, path = tempfile.mkstemp(prefix="mla-deploy-", suffix=".traceback.txt")
    except OSError:
        return Bug("CLI-BUG", f"unexpected {told}\n{text}", hint="the traceback stands above")
    try:
        os.write(handle, text.encode("utf-8", "backslashreplace"))
    finally:
        os.close(handle)
    return Bug(
        "CLI-BUG",
        f"unexpected {told}; the traceback is in {path}",
        hint=_REPORTS,
        traceback=path,
    )
