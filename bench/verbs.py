"""Runs `mla-deploy` as a user does, each command a process, and says why one was refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from peer_rows import FORMS

from mla_deploy.bundle import is_bundle

_COMMAND = "from mla_deploy.cli import main; import sys; sys.exit(main())"


class NotRun(Exception):
    """Why something was not measured."""


def exported(checkpoint: Path, form: str, work: Path) -> Path:
    """The bundle of a form of FORMS in `work`, exported unless it is there. Raises: NotRun."""
    out = work / f"{checkpoint.name}-{form}"
    if not is_bundle(out):
        run_verb("export", checkpoint, "--out", out, *FORMS[form])
    return out


def run_verb(*arguments: Any) -> dict[str, Any]:
    """The result of one command. Raises: NotRun."""
    command = [sys.executable, "-c", _COMMAND, *map(str, arguments), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    told = json.loads(done.stdout)
    if not told["ok"]:
        raise NotRun(told["error"]["message"])
    found: dict[str, Any] = told["result"]
    return found
