"""One checkpoint and one bundle for the end-to-end tests of a module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Command, command
from tests.e2e.pages import Reader
from tests.tiny import write_tiny

__all__ = ["Command", "command"]
Tell = Callable[[list[str], Path], str]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DeepSeek-V3 with a tokenizer."""
    return write_tiny(tmp_path_factory.mktemp("source") / "checkpoint", tokenizer=True)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    import mla_deploy

    return mla_deploy.export(checkpoint, checkpoint.with_name("bundle")).path


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader()


@pytest.fixture
def told_by(reader: Reader, capfd: pytest.CaptureFixture[str]) -> Tell:
    """`told_by(command, folder)`: what one command of the module's page prints."""
    return lambda command, folder: reader.told_by(command, folder, capfd)
