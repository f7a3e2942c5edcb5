"""Every command and snippet of README.md, run in order in one folder, as a reader would."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import Tell
from tests.e2e.pages import printed_by

ROOT = Path(__file__).parents[2]
MODEL = "models/tiny-deepseek-v3"
FOREIGN = "tests/foreign/stored"
BLOCK = re.compile(
    r"(?:<!-- not run by tests: (?P<reason>.+?) -->\n)?```(?P<kind>bash|python)\n(?P<text>.+?)```",
    re.DOTALL,
)
BLOCKS = [
    (match["kind"], match["text"], match["reason"])
    for match in BLOCK.finditer((ROOT / "README.md").read_text("utf-8"))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model in its place; the bundle of one block is there for the next."""
    made = tmp_path_factory.mktemp("readme")
    for name in (MODEL, FOREIGN):
        shutil.copytree(ROOT / name, made / name)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_block_runs(folder: Path, index: int, told_by: Tell) -> None:
    kind, text, reason = BLOCKS[index]
    if reason is not None:
        pytest.skip(f"{' and '.join(re.findall(r'^make [a-z]+', text, re.M))}: {reason}")
    if kind == "python":
        shutil.rmtree(folder / "bundle", ignore_errors=True)
        printed_by([sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", text], folder)
        return
    for line in text.splitlines():
        command = shlex.split(line, comments=True)
        assert command[0] == "mla-deploy", f"README runs {command[0]}, which no test can check"
        assert told_by(command, folder).strip(), f"{line} printed nothing"


def test_readme_opens_with_the_two_commands() -> None:
    kind, text, _ = BLOCKS[0]
    assert kind == "bash"
    assert [line.split("#")[0].strip() for line in text.splitlines()] == ["make demo", "make test"]


def test_every_verb_is_shown() -> None:
    from mla_deploy.cli.group import group

    shown = {line.split()[1] for kind, text, _ in BLOCKS if kind == "bash"
             for line in text.splitlines() if line.startswith("mla-deploy ")}  # fmt: skip
    assert shown == set(group.commands)


def test_nothing_was_left_to_fill_in() -> None:
    assert "TODO" not in (ROOT / "README.md").read_text("utf-8")
