"""docs/plan.md: its commands run, and what it shows is what they print."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.cli.conftest import Command, command

__all__ = ["command"]
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "plan.md").read_text("utf-8")
SHOWN = re.findall(r"```text\n\$ (mla-deploy plan [^\n]+)\n(.+?)```", PAGE, re.DOTALL)
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.+?)```", PAGE, re.DOTALL)
    for line in block.split("\n")
]


@pytest.mark.parametrize("index", range(len(SHOWN)))
def test_what_is_shown_is_printed(
    command: Command, monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    line, shown = SHOWN[index]
    out = command(*shlex.split(line)[1:]).out
    wanted = [text.rstrip() for text in shown.splitlines() if text.strip()]
    assert [text.rstrip() for text in out.splitlines() if text.strip()] == wanted


def test_every_command_runs(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    found = [shlex.split(line) for line in COMMANDS if line]
    assert len(found) == 4 and len(SHOWN) == 2
    for program, *arguments in found:
        assert program == "mla-deploy"
        ran = command(*arguments)
        assert (ran.status, bool(ran.out.strip())) == (0, True), ran.err
    assert (tmp_path / "plan.svg").exists()
