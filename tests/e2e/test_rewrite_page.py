"""The commands of docs/rewrite.md, run in order beside a graph that transformers exported."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GRAPH = ROOT / "tests" / "foreign" / "stored" / "transformers-decode.onnx"
PAGE = (ROOT / "docs" / "rewrite.md").read_text("utf-8")
BLOCKS = re.findall(r"```bash\n(.+?)```", PAGE, re.DOTALL)


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path) -> None:
    shutil.copy(GRAPH, tmp_path / "model.onnx")
    (block,) = BLOCKS
    commands = [shlex.split(line) for line in block.splitlines()]
    assert [command[1] for command in commands] == ["inspect", "rewrite", "validate"]
    told = []
    for command in commands:
        binary = str(Path(sys.executable).with_name(command[0]))
        done = subprocess.run(
            [binary, *command[1:]],
            cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        told.append(done.stdout)
    assert "history-expanded" in told[0] and "of cache a token" in told[1]
    assert "cases passed" in told[2]
    assert (tmp_path / "rewritten.explain.svg").read_text("utf-8").startswith("<svg")
