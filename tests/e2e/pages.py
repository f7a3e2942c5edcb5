"""The commands that a page of docs/ shows, run in order in one folder."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mla_deploy.cli import main

ROOT = Path(__file__).parents[2]


def commands_of(page: str) -> list[list[str]]:
    """Of its one block of commands."""
    text = (ROOT / "docs" / page).read_text("utf-8")
    (block,) = re.findall(r"```bash\n(.+?)```", text, re.DOTALL)
    return [shlex.split(line) for line in block.splitlines()]


class Reader:
    """Types what a page shows: a verb's first command starts the program, the next ones of that
    verb call its entry point in this process, which saves the seconds of its imports."""

    def __init__(self) -> None:
        self.started: set[str] = set()

    def told_by(self, command: list[str], folder: Path, capfd: pytest.CaptureFixture[str]) -> str:
        """What a command prints, 80 columns wide; it must end well."""
        program, verb, *_ = command
        if verb in self.started:
            with pytest.MonkeyPatch.context() as patched:
                patched.chdir(folder)
                patched.setenv("COLUMNS", "80")
                patched.setattr(sys, "path", [*sys.path])  # a factory is looked for in `folder`
                capfd.readouterr()
                status = main(command[1:])
            out, err = capfd.readouterr()
            assert status == 0, f"{command} ended with {status}\n{err}"
            return out
        self.started.add(verb)
        return printed_by([str(Path(sys.executable).with_name(program)), *command[1:]], folder)


def printed_by(command: list[str], folder: Path) -> str:
    """What a program prints; it must end well."""
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "COLUMNS": "80"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stderr}"
    return done.stdout
