"""Runs a script of this folder, or a module of the package, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run_script(name: str, *arguments: object, limit: float | None = None) -> str:
    """What it printed; its advice on stderr is dropped.

    Raises: subprocess.CalledProcessError, subprocess.TimeoutExpired after `limit` seconds.
    """
    return _printed([str(Path(__file__).with_name(name)), *map(str, arguments)], limit)


def run_module(name: str, *arguments: object, limit: float | None = None) -> str:
    """As `run_script`, of a module by its full name."""
    return _printed(["-m", name, *map(str, arguments)], limit)


def _printed(arguments: list[str], limit: float | None) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], check=True, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, timeout=limit,
    )  # fmt: skip
    return done.stdout
