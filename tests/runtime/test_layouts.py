"""The same runner over every way a bundle can be laid out: half precision, split rows, growing."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from mla_deploy import open_checkpoint, open_runner
from mla_deploy.runtime.sessions import GraphSessions
from mla_deploy.runtime.torch_runner import TorchRunner
from tests.exported import GROWING, HALF_SPLIT, PLAIN, exported
from tests.tiny import VOCAB_SIZE


def ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, count).tolist()


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max())


@pytest.mark.parametrize(
    ("options", "itemsize", "bound"),
    [(HALF_SPLIT, 2, 2e-2), (GROWING, 2, 1e-1)],
)
def test_other_layouts(options: dict[str, Any], itemsize: int, bound: float) -> None:
    made = exported(**options)
    runner = open_runner(made.bundle, batch=2, capacity=64, threads=1, check_finite=True)
    with open_checkpoint(made.checkpoint) as checkpoint:
        source = TorchRunner(checkpoint, 2)
    rows = [ids(17), ids(5, 1)]
    steps = [(runner.prefill(rows), source.prefill(rows))]
    steps += [(runner.decode(ids(2, i)), source.decode(ids(2, i))) for i in range(20)]
    # Relative: the logits of a half-precision cache differ by its rounding.
    assert max(distance(*step) / np.abs(step[1]).max() for step in steps) < bound
    grown = 37 if options.get("cache") == "growing" else 64
    assert runner.cache_bytes == 2 * 2 * grown * (16 + 8) * itemsize


def test_half_precision_weights_are_widened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefill graph keeps no fp32 copy of its own; fp32 graphs have nothing to keep."""
    left_out: list[list[str]] = []
    real = ort.InferenceSession

    def spy(*args: Any, disabled_optimizers: list[str], **options: Any) -> Any:
        left_out.append(disabled_optimizers)
        return real(*args, disabled_optimizers=disabled_optimizers, **options)

    monkeypatch.setattr(ort, "InferenceSession", spy)
    for options in (HALF_SPLIT, PLAIN):
        sessions = GraphSessions(exported(**options).bundle, threads=1)
        sessions.session("decode"), sessions.session("prefill")
    assert [len(passes) for passes in left_out] == [0, 2, 0, 0]
    assert "ConstantFolding" in left_out[1]


def test_all_logits() -> None:
    runner = open_runner(exported(**GROWING).bundle, batch=2, threads=1, chunk=4)
    rows = [ids(9), ids(2, 1)]
    found = runner.prefill_all(rows)
    assert [part.shape for part in found] == [(9, VOCAB_SIZE), (2, VOCAB_SIZE)]
    runner.reset()
    np.testing.assert_array_equal(runner.prefill(rows), np.stack([part[-1] for part in found]))
    for row, part in zip(rows, found, strict=True):
        steps = open_runner(runner._sessions.bundle, threads=1)
        for token, logits in zip(row, part, strict=True):
            assert distance(steps.decode([token])[0], logits) < 1e-4
