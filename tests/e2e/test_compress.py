"""The commands of docs/compress.md, run in order in one folder that holds a small Llama."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compress.llamas import write_llama
from tests.e2e.pages import commands_of, told_by


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path) -> None:
    write_llama(tmp_path / "llama")
    commands = commands_of("compress.md")
    order = ["compress"] * 4 + ["export", "validate", "compress"]
    assert [command[1] for command in commands] == order
    told = [told_by(command, tmp_path) for command in commands]
    assert "100 % of the cache" in told[0] and "exact" in told[0]
    assert "50 % of the cache" in told[1]
    assert "45 % of the cache" in told[3] or "44 % of the cache" in told[3]
    assert "cases passed" in told[5]
    assert "50 % of the cache" in told[6]
    pages = [(tmp_path / name).read_text("utf-8") for name in ("half.html", "again.html")]
    assert pages[0] == pages[1]
