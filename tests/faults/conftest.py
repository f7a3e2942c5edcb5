"""`mla-deploy export` as a user types it, on what it must refuse without leaving a trace."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Command, command
from tests.faults.refused import MAX_SECONDS, processor_seconds

__all__ = ["command"]

Refuses = Callable[..., dict[str, Any]]


def listing(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Everything beneath `folder`: kind, size and time of a file, where a link leads."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in sorted(folder.rglob("*")):
        seen = path.lstat()
        if path.is_symlink():
            what: tuple[Any, ...] = (os.readlink(path),)
        else:
            # A folder's time moves when a stage comes and goes in it.
            what = () if path.is_dir() else (seen.st_size, seen.st_mtime_ns)
        found[path.relative_to(folder).as_posix()] = (seen.st_mode, *what)
    return found


@pytest.fixture
def refuses(command: Command) -> Refuses:
    """`refuses(checkpoint, "CKPT-SHAPE", "kv_b_proj")`: the error, as --json tells it.

    Asked twice, for people and for programs: exit status, code, a message or hint with every word
    of `named`, stdout empty or exactly one object of the schema, and on disk nothing that was not
    there before.
    """

    def check(
        checkpoint: Path,
        code: str,
        *named: str,
        exit_status: int = 4,
        options: tuple[object, ...] = (),
        out: str | Path | None = None,
        seconds: float = MAX_SECONDS,
    ) -> dict[str, Any]:
        arguments = ("export", checkpoint, "--out", out or checkpoint.parent / "bundle", *options)
        before = listing(checkpoint.parent)
        started = processor_seconds()
        told = command(*arguments)
        assert processor_seconds() - started < seconds
        assert (told.status, told.out) == (exit_status, ""), told.err
        assert f"error[{code}]: " in told.err
        assert "Traceback" not in told.err
        answer = command(*arguments, "--json")
        assert answer.status == exit_status
        error: dict[str, Any] = answer.object()["error"]
        assert error["code"] == code
        for word in named:
            assert word in error["message"] + error["hint"], f"{word!r} is not named in: {error}"
        assert listing(checkpoint.parent) == before
        return error

    return check


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What headers and config can tell is told before the trace, the slow part of an export."""

    def trace(*_: object) -> None:
        raise AssertionError("traced a model that had to be refused before")

    monkeypatch.setattr("mla_deploy.export.pipeline.trace_model", trace)
