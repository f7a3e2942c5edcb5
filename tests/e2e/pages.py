"""The commands that a page of docs/ shows, run in order in one folder."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def commands_of(page: str) -> list[list[str]]:
    """Of its one block of commands."""
    text = (ROOT / "docs" / page).read_text("utf-8")
    (block,) = re.findall(r"```bash\n(.+?)```", text, re.DOTALL)
    return [shlex.split(line) for line in block.splitlines()]


def told_by(command: list[str], folder: Path) -> str:
    """What a command prints; it must end well."""
    binary = str(Path(sys.executable).with_name(command[0]))
    done = subprocess.run(
        [binary, *command[1:]],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
