"""The commands of docs/compress.md, run in order in a folder with a Llama and an MLA model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.compress.llamas import TINY, write_llama
from tests.e2e.conftest import Tell
from tests.e2e.pages import commands_of


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path, told_by: Tell) -> None:
    write_llama(tmp_path / "llama")
    shutil.copytree(TINY, tmp_path / "mla")
    commands = commands_of("compress.md")
    verbs = [command[1] for command in commands]
    assert verbs == [*["compress"] * 4, "export", "validate", *["compress"] * 2]
    told = [told_by(command, tmp_path) for command in commands]
    assert "100 % of the cache" in told[0] and "exact" in told[0]
    assert "50 % of the cache" in told[1]
    assert "Weighed for 45 %" in told[3]
    assert "cases passed" in told[5]
    pages = [(tmp_path / name).read_text("utf-8") for name in ("half.html", "again.html")]
    assert pages[0] == pages[1]
    assert "4 latent attentions" in told[6]
    assert "loss</span>" in (tmp_path / "native.html").read_text("utf-8")
    assert "50 % of the cache" in told[7]
