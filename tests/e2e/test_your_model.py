"""The commands of docs/your-model.md, run in order in one folder, for both examples."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.e2e.conftest import Tell

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "your-model.md").read_text("utf-8")
COMMANDS = re.findall(r"```bash\n(.+?)```", PAGE, re.DOTALL)[0].splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("example", ["plain_mla", "seam_mla"])
def test_commands_run(example: str, tmp_path: Path, told_by: Tell) -> None:
    shutil.copytree(ROOT / "docs" / "examples", tmp_path / "docs" / "examples")
    sys.path.insert(0, str(ROOT))
    try:
        module = __import__(f"docs.examples.{example}", fromlist=["model"]).model()
    finally:
        sys.path.remove(str(ROOT))
    torch.manual_seed(1)
    state = {name: torch.randn_like(value) * 0.3 for name, value in module.state_dict().items()}
    save_file(state, tmp_path / "mine.safetensors")
    assert len(COMMANDS) == 2
    for line in COMMANDS:
        told = told_by(shlex.split(line.replace("plain_mla", example)), tmp_path)
    assert "equal to its source" in told


def test_page_links_the_examples() -> None:
    for example in ("plain_mla", "seam_mla"):
        assert f"examples/{example}.py" in PAGE
