"""An interruption says what stands: a bundle that was published before its loss was measured."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from mla_deploy.validate import loss_check
from tests.cli.conftest import Command, command
from tests.exported import exported

__all__ = ["command"]


@pytest.mark.parametrize(
    ("verb", "number", "status"),
    [("export", signal.SIGINT, 130), ("quantize", signal.SIGTERM, 143)],
)
def test_a_signal_while_the_loss_is_measured(
    verb: str,
    number: signal.Signals,
    status: int,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stopped(*_: Any) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr(loss_check, "loss_over", stopped)
    made, out = exported("v3"), tmp_path / "out"
    source = made.checkpoint if verb == "export" else made.bundle.path
    ran = command(verb, source, "--weights", "int8", "--out", out)
    assert ran.status == status
    assert f"'{out}' was written and is whole; its loss was not measured" in ran.err
    assert "nothing was left" not in ran.err
    assert command("inspect", out).status == 0
