"""Ctrl-C and SIGTERM become exceptions, so that `with` blocks clean up; a second one waits.

First signal: raise. Second: say that cleaning is under way. Third: leave at once. An exception
raised while native code calls back (a weak reference dies, say) is dropped by Python; tracing a
model spends much of its time there, so an interruption that is dropped is raised again.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from mla_deploy.cli.exits import Interrupted, Terminated
from mla_deploy.errors import MlaDeployError

_AGAIN_SECONDS = 0.01


class Interruption(KeyboardInterrupt):
    """Raised in the main thread by the first signal; not an `Exception`, so nobody swallows it.

    It lives while it is on its way or being handled; `dropped` is called when it is gone.
    """

    def __init__(self, dropped: Callable[[], None]) -> None:
        super().__init__()
        self.stands = ""  # what was published before, in words
        self._dropped = dropped

    def __del__(self) -> None:
        self._dropped()


class SignalWatch:
    """Which signal came. `error(...)` is the refusal it stands for, or None when none came."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._count = 0
        self._settled = False

    def handle(self, number: int, _frame: FrameType | None) -> None:
        self._count += 1
        if self._count == 1:
            self.received = number
            raise Interruption(self._raise_later)
        if self._count == 2:
            os.write(2, b"mla-deploy: cleaning up (once more to leave at once)\n")
            return
        os._exit(128 + number)

    def handle_again(self, _number: int, _frame: FrameType | None) -> None:
        """The timer's handler: raise the interruption that was dropped anew."""
        if not self._settled:
            raise Interruption(self._raise_later)

    def settle(self) -> None:
        """The command has ended, well or not: nothing is raised any more."""
        self._settled = True

    def _raise_later(self) -> None:
        # Not at once: this runs where an exception would be dropped too.
        if not self._settled:
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)

    def error(self, problem: BaseException) -> MlaDeployError | None:
        """`problem` is what ended the command."""
        if self.received is None:
            return None
        stands = problem.stands if isinstance(problem, Interruption) else ""
        left = stands or "nothing was left behind"
        if self.received == signal.SIGTERM:
            return Terminated("CLI-TERMINATED", f"stopped by SIGTERM; {left}")
        return Interrupted("CLI-INTERRUPTED", f"interrupted; {left}")


@contextmanager
def standing(what: str) -> Iterator[None]:
    """In this block an interruption says that `what` stands: it was published before."""
    try:
        yield
    except Interruption as stopped:
        stopped.stands = what
        raise


@contextmanager
def watched_signals() -> Iterator[SignalWatch]:
    """Install the handlers for the length of the block; in the main thread, Python's only one."""
    watch = SignalWatch()
    if threading.current_thread() is not threading.main_thread():
        yield watch
        return
    handlers = {
        signal.SIGALRM: watch.handle_again,
        signal.SIGINT: watch.handle,
        signal.SIGTERM: watch.handle,
    }
    kept = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield watch
    finally:
        watch.settle()
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in kept.items():
            signal.signal(number, handler)
