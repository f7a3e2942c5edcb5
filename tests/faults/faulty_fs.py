"""File systems that misbehave at call k, and the one that only counts and records its calls."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mla_deploy.bundle.filesystem import FileSystem

CALLS = (
    "make_folder", "create", "write", "sync", "close", "sync_folder", "rename_new", "exchange",
    "can_exchange", "remove_file", "remove_tree", "free_bytes",
)  # fmt: skip
Event = Callable[[], None]


class ScriptedFileSystem(FileSystem):
    """Runs `before` and `after` around its calls numbered in `at`, the first call being 1."""

    def __init__(
        self, at: tuple[int, ...] = (), before: Event | None = None, after: Event | None = None
    ) -> None:
        self.log: list[tuple[str, tuple[Any, ...]]] = []
        self._names: dict[int, Path] = {}
        for call in CALLS:
            setattr(self, call, functools.partial(self._run, call, at, before, after))

    def _run(
        self,
        call: str,
        at: tuple[int, ...],
        before: Event | None,
        after: Event | None,
        *given: Any,
    ) -> Any:
        self.log.append((call, tuple(self._shown(call, item) for item in given)))
        number = len(self.log)
        if number in at and before is not None:
            if call == "close":
                given[0].close()  # a failing close has let the descriptor go all the same
            before()
        result = getattr(FileSystem, call)(self, *given)
        if call == "create":
            self._names[result.fileno()] = given[0]
        if number in at and after is not None:
            if call == "create":
                result.close()
            after()
        return result

    def _shown(self, call: str, item: Any) -> Any:
        """A descriptor is logged as the path it was made for, data as its size."""
        if call in ("write", "sync") and isinstance(item, int):
            return self._names.get(item)
        if call == "close":
            return self._names.pop(item.fileno(), None)
        return len(item) if isinstance(item, memoryview) else item


def failing(number: int, error: int) -> ScriptedFileSystem:
    """Call `number` raises OSError `error` and does nothing."""

    def fail() -> None:
        raise OSError(error, os.strerror(error))

    return ScriptedFileSystem((number,), before=fail)


def interrupted(*numbers: int, after: bool = False) -> ScriptedFileSystem:
    """Ctrl-C arrives just before (or just after) the calls `numbers`."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    if after:
        return ScriptedFileSystem(numbers, after=interrupt)
    return ScriptedFileSystem(numbers, before=interrupt)


def killed(number: int, *, after: bool) -> ScriptedFileSystem:
    """kill -9 just before or just after call `number`; for use in a forked child."""

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if after:
        return ScriptedFileSystem((number,), after=kill)
    return ScriptedFileSystem((number,), before=kill)
