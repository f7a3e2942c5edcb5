"""The commands of docs/compress.md, run in order in one folder that holds a small Llama."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compress.llamas import write_llama

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "compress.md").read_text("utf-8")
BLOCKS = re.findall(r"```bash\n(.+?)```", PAGE, re.DOTALL)


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path) -> None:
    write_llama(tmp_path / "llama")
    (block,) = BLOCKS
    commands = [shlex.split(line) for line in block.splitlines()]
    assert [command[1] for command in commands] == ["compress"] * 3 + ["export", "validate"]
    told = []
    for command in commands:
        binary = str(Path(sys.executable).with_name(command[0]))
        done = subprocess.run(
            [binary, *command[1:]],
            cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        told.append(done.stdout)
    assert "100 % of the cache" in told[0] and "exact" in told[0]
    assert "50 % of the cache" in told[1]
    assert "cases passed" in told[4]
    pages = [(tmp_path / name).read_text("utf-8") for name in ("half.html", "again.html")]
    assert pages[0] == pages[1]
