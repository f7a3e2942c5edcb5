"""Runs a script of this folder in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run_script(name: str, *arguments: object, limit: float | None = None) -> str:
    """What it printed; its advice on stderr is dropped.

    Raises: subprocess.CalledProcessError, subprocess.TimeoutExpired after `limit` seconds.
    """
    command = [sys.executable, str(Path(__file__).with_name(name)), *map(str, arguments)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        timeout=limit,
    )  # fmt: skip
    return done.stdout
