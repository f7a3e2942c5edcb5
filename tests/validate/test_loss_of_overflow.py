"""Weights that are finite and activations that are not: no loss is small, and nothing is fitted."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from mla_deploy.cli import main
from mla_deploy.validate.gates import CACHE_LOSS
from mla_deploy.validate.loss import loss_over
from mla_deploy.validate.opening import open_sessions
from tests.cli.conftest import Command, command
from tests.exported import exported
from tests.tiny import write_preset

__all__ = ["command"]


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose first dense layer leaves fp32."""
    folder = write_preset(tmp_path_factory.mktemp("overflow") / "checkpoint", "v3", tokenizer=True)
    weights = load_file(folder / "model.safetensors")
    for name in ("up_proj", "down_proj"):
        weights[f"model.layers.0.mlp.{name}.weight"] *= 1e30
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_logits_that_are_not_finite_are_as_far_as_it_gets() -> None:
    bundle = exported("v3", cache_dtype="int8").bundle
    row = tuple(range(3, 35))
    sessions = open_sessions(bundle, 1)

    def nowhere(tokens: tuple[int, ...]) -> NDArray[np.float32]:
        return np.full((len(tokens), 96), np.nan, np.float32)

    found = loss_over("text", [row], nowhere, sessions)
    assert found.mean_kl == math.inf and found.top1 == 0.0
    assert len(found.failures(CACHE_LOSS["int8"])) == 2


def test_export_tells_that_its_loss_is_not_finite(
    command: Command, overflowing: Path, tmp_path: Path
) -> None:
    asked = ("export", overflowing, "--cache-dtype", "int8", "--out", tmp_path / "out", "--json")
    found = command(*asked).object("export")["result"]["loss"]
    assert found["mean_kl"] is None and found["top1"] == 0.0
    assert found["failures"]


def test_nothing_is_fitted_to_logits_that_are_not_finite(
    overflowing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("In the beginning a row was written once and never moved. " * 200)
    words = ["export", str(overflowing), "--weights", "int4", "--calibrate", str(text)]
    assert main([*words, "--out", str(tmp_path / "out")]) == 3
    assert "RUN-NONFINITE" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
