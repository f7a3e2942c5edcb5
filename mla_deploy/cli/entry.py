"""The entry point: one command, run once, every ending turned into its exit code.

click's own `main` exits 1 on Ctrl-C and on a closed pipe, dies raw on SIGTERM and prints
tracebacks for OSError. Here each is one error of `exits.py`, told on stderr or as JSON.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

import click

from mla_deploy.cli.exits import BROKEN_PIPE, error_from
from mla_deploy.cli.group import group
from mla_deploy.cli.output import Screen
from mla_deploy.cli.signals import SignalWatch, watched_signals

_NAME = "mla-deploy"
_COMPLETION = "_MLA_DEPLOY_COMPLETE"  # set by the shell function that click's completion installs


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status (the table in `exits.py`) and never raises."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    screen = Screen()
    with watched_signals() as watch:
        try:
            status = _run(arguments, screen)
            screen.close()
            return status
        except BaseException as problem:
            watch.settle()
            return _ending(problem, screen, watch, arguments)


def _run(arguments: list[str], screen: Screen) -> int:
    if _COMPLETION in os.environ:
        try:
            group.main(arguments, prog_name=_NAME, complete_var=_COMPLETION)
        except SystemExit as done:
            return done.code if isinstance(done.code, int) else 0
    try:
        with group.make_context(_NAME, arguments, obj=screen) as context:
            group.invoke(context)
    except click.exceptions.Exit as done:  # --help and --version
        return done.exit_code
    return 0


def _ending(
    problem: BaseException, screen: Screen, watch: SignalWatch, arguments: list[str]
) -> int:
    if _is_closed_pipe(problem):
        return _hang_up()
    if isinstance(problem, (click.ClickException, KeyboardInterrupt)) and "--json" in arguments:
        screen.as_json = True  # the parser failed, or was stopped, before it came to the flag
    error = watch.error(problem) or error_from(problem)
    try:
        screen.fail(error)
        screen.close()
    except OSError as second:
        if _is_closed_pipe(second):
            return _hang_up()
        _drop_stdout()  # it is full, or gone: people are told on stderr instead
        screen.as_json = False
        screen.fail(error)
    return error.exit_status


def _is_closed_pipe(problem: BaseException) -> bool:
    return isinstance(problem, OSError) and problem.errno == errno.EPIPE


def _hang_up() -> int:
    """The reader went away: say nothing more."""
    _drop_stdout()
    return BROKEN_PIPE


def _drop_stdout() -> None:
    """What is left in the buffer goes nowhere, also when Python flushes it at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
