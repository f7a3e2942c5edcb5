"""Weights held in private memory, in huge pages: the same numbers; a prompt's graph still maps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mla_deploy
from mla_deploy import machine, open_runner
from mla_deploy.bundle import Bundle, open_bundle
from mla_deploy.errors import EnvironmentFailure, InputError
from mla_deploy.runtime import OnnxRunner
from mla_deploy.runtime.huge_pages import huge_page_bytes
from mla_deploy.runtime.sessions import GraphSessions, anonymous_bytes
from tests.exported import exported, exported_family
from tests.tiny import write_preset

SIZES = {"hidden_size": 512, "intermediate_size": 8192}  # 25 million weights
PROMPT = 200  # longer than what the decode graph takes


def logits(bundle: Bundle, hold: bool) -> list[Any]:
    runner = open_runner(bundle, batch=2, capacity=260, threads=1, hold_weights=hold)
    found = [runner.prefill([[i % 90 for i in range(PROMPT)], [7, 8, 9]])]
    return [*found, *(runner.decode([token, token + 1]) for token in (5, 60, 2))]


def same(bundle: Bundle) -> None:
    for held, mapped in zip(logits(bundle, True), logits(bundle, False), strict=True):
        np.testing.assert_array_equal(held, mapped)


@pytest.mark.parametrize("options", [{}, {"dtype": "bf16"}, {"weights": "int4"}])
def test_the_numbers_are_the_same(options: dict[str, Any]) -> None:
    same(exported(**options).bundle)


@pytest.mark.parametrize("family", ["deepseek_v32", "kimi_linear", "longcat_flash"])
def test_they_are_with_every_kind_of_layer(family: str) -> None:
    same(exported_family(family).bundle)


def test_weights_in_a_checkpoint_s_own_files_are_held_too(tmp_path: Path) -> None:
    folder = write_preset(tmp_path / "checkpoint", "v3-all-dense")
    bundle = mla_deploy.export(folder, in_place=True)
    assert len(bundle.weight_files) == 2
    same(bundle)


def held_bytes(bundle: Bundle, hold: bool) -> tuple[int, int]:
    """Private memory after a prompt and steps, and of it what moved into huge pages."""
    before = anonymous_bytes()
    sessions = GraphSessions(bundle, 1, holds_weights=hold)
    runner = OnnxRunner(sessions, capacity=256)
    runner.prefill([[5] * PROMPT])
    runner.decode([5])
    assert len(sessions.opened()) == 2
    moved = sessions.settle()
    return anonymous_bytes() - before, moved


def in_a_process(bundle: Path, hold: bool) -> tuple[int, int]:
    command = [sys.executable, "-m", "tests.runtime.test_held_weights", str(bundle), str(int(hold))]
    fixed = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run(command, capture_output=True, text=True, check=False, env=fixed)
    assert child.returncode == 0, child.stderr
    taken, moved = json.loads(child.stdout)
    return taken, moved


@pytest.mark.parametrize(
    ("dtype", "hold"), [("fp32", True), ("fp32", False), ("bf16", False)], ids=str
)
def test_what_is_private_is_held_once_and_moves(tmp_path: Path, dtype: str, hold: bool) -> None:
    """bf16 weights become floats in private memory unasked; a prompt makes them once more."""
    folder = write_preset(tmp_path / "checkpoint", "v3-all-dense", **SIZES)
    bundle = mla_deploy.export(folder, tmp_path / "bundle", dtype=dtype)
    stored = bundle.files["weights.safetensors"].bytes
    floats, most = (stored, 1.5 * stored) if dtype == "fp32" else (2 * stored, 4 * stored)
    assert floats > 75 << 20
    taken, moved = in_a_process(bundle.path, hold)
    if hold or dtype == "bf16":
        assert 0.8 * floats < taken < most
        assert moved > 0.8 * floats or not huge_page_bytes()
    else:
        assert taken < 0.3 * floats and not moved


def test_held_weights_have_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = exported().bundle
    weights = bundle.files["weights.safetensors"].bytes
    monkeypatch.setattr(machine, "available_bytes", lambda: weights - 1)
    assert open_runner(bundle, capacity=4, threads=1).capacity == 4
    with pytest.raises(EnvironmentFailure, match="RUN-MEMORY") as caught:
        open_runner(bundle, capacity=4, threads=1, hold_weights=True)
    assert "weights not held" in caught.value.hint


def test_an_engine_has_its_own() -> None:
    with pytest.raises(InputError, match="RUN-RUNTIME") as caught:
        open_runner(exported().bundle, runtime="tensorrt", hold_weights=True)
    assert "hold_weights" in caught.value.message


if __name__ == "__main__":
    print(json.dumps(held_bytes(open_bundle(sys.argv[1]), sys.argv[2] == "1")))
