"""What a verb prints: a one-line summary, then tables; or, with `--json`, exactly one object.

Results go to stdout; logs, progress and errors to stderr. With `--json` the process's stdout is
pointed at stderr until the object is written, so that a print in some library cannot spoil it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mla_deploy import __version__
from mla_deploy.errors import MlaDeployError
from mla_deploy.shapes import byte_text as byte_text
from mla_deploy.strict_json import finite

if TYPE_CHECKING:
    from rich.console import Console

TOOL = {"name": "mla-deploy", "version": __version__}
_LEVELS = (logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG)


@dataclass(frozen=True)
class Sheet:
    """A table before it is drawn. Columns whose name starts with `#` hold numbers: to the right."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True)
class Outcome:
    """What a verb hands back: for people (summary, picture, sheets), for programs (result), and a
    refusal when the work was done and the answer is no. A picture is lines of characters."""

    summary: str
    result: dict[str, Any]
    sheets: tuple[Sheet, ...] = ()
    refusal: MlaDeployError | None = field(default=None)
    picture: str = ""


class Screen:
    """Where this run's output goes; made once per command by `entry.main`."""

    def __init__(self) -> None:
        self.as_json = False
        self.quiet = False
        self._real_stdout: int | None = None

    def configure(self, *, as_json: bool, quiet: bool, verbose: int) -> None:
        self.as_json, self.quiet = as_json, quiet
        ours = 0 if quiet else 1 + min(verbose, 2)
        # Libraries are heard one step later than we are: their warnings are about our graphs.
        logging.basicConfig(
            level=_LEVELS[max(ours - 1, 0)],
            format="%(levelname)s %(name)s: %(message)s",
            force=True,
        )
        logging.getLogger("mla_deploy").setLevel(_LEVELS[ours])
        if as_json:
            self._point_stdout_at_stderr()

    def show(self, outcome: Outcome) -> None:
        if self.as_json:
            if outcome.refusal is None:
                self._write_object({"ok": True, "result": outcome.result, "tool": TOOL})
            return
        print(outcome.summary)
        if not self.quiet:
            console = _console()
            if outcome.picture:
                print(f"\n{outcome.picture}\n")
            for sheet in outcome.sheets:
                _draw(console, sheet)

    def fail(self, error: MlaDeployError) -> None:
        if self.as_json:
            self._write_object({"ok": False, "error": error.to_dict(), "tool": TOOL})
            return
        hint = f"\n  hint: {error.hint}" if error.hint else ""
        print(f"error[{error.code}]: {error.message}{hint}", file=sys.stderr)

    def close(self) -> None:
        """Give stdout back; flush, so that a full disk or a gone reader is seen here."""
        if self._real_stdout is not None:
            os.dup2(self._real_stdout, 1)
            os.close(self._real_stdout)
            self._real_stdout = None
        sys.stdout.flush()

    def _point_stdout_at_stderr(self) -> None:
        sys.stdout.flush()
        with suppress(OSError, ValueError):  # stdout is not a file: nothing native can print there
            if sys.stdout.fileno() == 1 and self._real_stdout is None:
                self._real_stdout = os.dup(1)
                os.dup2(2, 1)

    def _write_object(self, value: dict[str, Any]) -> None:
        text = json.dumps(finite(value), indent=2, allow_nan=False, default=str) + "\n"
        self.close()
        sys.stdout.write(text)
        sys.stdout.flush()


def _console() -> Console:
    from rich.console import Console

    class PipeConsole(Console):
        """rich answers a closed pipe with SystemExit(1); `entry.main` has its own answer."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    return PipeConsole(highlight=False)


def _draw(console: Console, sheet: Sheet) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if sheet.title:
        console.print(Text(sheet.title, style="bold"))
    if sheet.columns == ("",):  # a list, not a table
        for row in sheet.rows:
            console.print(Text(f" - {row[0]}"))
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in sheet.columns:
        number = column.startswith("#")
        table.add_column(
            column.removeprefix("#"),
            justify="right" if number else "left",
            no_wrap=number,
            overflow="fold",
        )
    for row in sheet.rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console.print(table)
