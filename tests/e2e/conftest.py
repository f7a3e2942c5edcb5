"""One checkpoint and one bundle for the end-to-end tests of a module."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Command, command
from tests.tiny import write_tiny

__all__ = ["Command", "command"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DeepSeek-V3 with a tokenizer."""
    return write_tiny(tmp_path_factory.mktemp("source") / "checkpoint", tokenizer=True)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    import mla_deploy

    return mla_deploy.export(checkpoint, checkpoint.with_name("bundle")).path
