"""The commands and snippets of docs/serving.md, run in order in one folder."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL = "models/tiny-deepseek-v3"
PAGE = (ROOT / "docs" / "serving.md").read_text("utf-8")
BLOCKS = re.findall(r"```(bash|python)\n(.+?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("serving")
    shutil.copytree(ROOT / MODEL, made / MODEL)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_block_runs(folder: Path, index: int) -> None:
    kind, text = BLOCKS[index]
    commands = [[sys.executable, "-W", "error", "-c", text]]
    if kind == "bash":
        given = [shlex.split(line) for line in text.splitlines()]
        commands = [[str(Path(sys.executable).with_name(c[0])), *c[1:]] for c in given]
    for command in commands:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
    assert ("tokens a pass" in done.stdout) == ("speculate" in text)


def test_the_page_shows_every_part() -> None:
    assert [kind for kind, _ in BLOCKS] == ["bash", *["python"] * 4]
