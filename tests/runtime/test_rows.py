"""Rows that begin and end independently of one another: idle rows, rows reset while others go on.

Each row is held against a runner of one row that is given the same calls, with NaN in every stale
slot before each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mla_deploy.bundle import Bundle
from mla_deploy.errors import InputError
from mla_deploy.runtime import OnnxRunner, onnx_runner
from mla_deploy.runtime.rows_by_cost import rows_by_cost
from mla_deploy.runtime.sessions import GraphSessions
from tests.exported import GROWING, HALF_SPLIT, PLAIN, exported, exported_family
from tests.runtime.test_poison import poisoned
from tests.tiny import VOCAB_SIZE

RunnerOf = Callable[..., OnnxRunner]
FP32 = 1e-4
CAPACITY = 90
BUNDLES: dict[str, tuple[Callable[[], Bundle], float]] = {
    "plain": (lambda: exported(**PLAIN).bundle, FP32),
    "half": (lambda: exported(**HALF_SPLIT).bundle, 2e-2),
    "int8": (lambda: exported(cache_dtype="int8").bundle, 5e-2),
    "int8-all": (lambda: exported(cache_dtype="int8-all").bundle, 5e-2),
    "growing": (lambda: exported(**GROWING).bundle, 2e-2),
    "ring": (lambda: exported_family("dots3_note_text").bundle, FP32),
    "states": (lambda: exported_family("kimi_linear").bundle, FP32),
    "chosen": (lambda: exported_family("deepseek_v32").bundle, FP32),
    "pools": (lambda: exported_family("glm5_next").bundle, FP32),
}


def call(rng: np.random.Generator, lengths: np.ndarray) -> list[list[int] | None]:
    """A random call: steps, prompts, or both; about half of the rows are idle."""
    longest = int(rng.choice([1, 1, 3, 25]))
    rows: list[list[int] | None] = []
    for length in lengths:
        count = min(int(rng.integers(1, longest + 1)), CAPACITY - int(length))
        idle = count < 1 or rng.random() < 0.5
        rows.append(None if idle else rng.integers(3, VOCAB_SIZE, count).tolist())
    return rows


@pytest.mark.parametrize("batch", [2, 5, 16])
@pytest.mark.parametrize("kind", BUNDLES)
def test_a_row_is_what_it_is_alone(kind: str, batch: int) -> None:
    """Forty random calls, rows reset on the way at any length."""
    made, bound = BUNDLES[kind]
    sessions = GraphSessions(made(), threads=1)
    rng, noise = np.random.default_rng(batch), np.random.default_rng(0)
    runner = OnnxRunner(sessions, batch=batch, capacity=CAPACITY, chunk=16)
    runner.poison()
    alone = [OnnxRunner(sessions, capacity=CAPACITY, chunk=16) for _ in range(batch)]
    for _ in range(40):
        ended = [row for row in range(batch) if rng.random() < 0.1]
        runner.reset(ended)
        for row in ended:
            alone[row].reset()
        rows = call(rng, runner.lengths)
        if not any(rows):
            continue
        poisoned(runner, "nan", noise)
        found = runner.prefill(rows)
        for row, tokens in enumerate(rows):
            wanted = alone[row].prefill([tokens])[0] if tokens else np.zeros(VOCAB_SIZE)
            assert np.abs(found[row] - wanted).max() / max(1, np.abs(wanted).max()) < bound, row
        assert runner.lengths.tolist() == [int(one.lengths[0]) for one in alone]
    for layer in runner.cache_layers:
        for row in range(batch):
            held = alone[row].cached_rows(layer, 0)
            assert np.abs(runner.cached_rows(layer, row) - held).max(initial=0) < max(bound, 1e-3)


def test_steps_of_some_rows(runner_of: RunnerOf, source_of: Any) -> None:
    """The same from `decode`, and the PyTorch source keeps the same contract."""
    runner, source = runner_of(3), source_of(3)
    for each in (runner, source):
        each.prefill([[5, 8], None, [7, 3, 9]])
    for tokens in ([4, None, None], [None, 6, 2], [None, 5, None], [1, 2, 3]):
        found, wanted = runner.decode(tokens), source.decode(tokens)
        assert np.abs(found - wanted).max() < FP32
        assert not found[[token is None for token in tokens]].any()
    for each in (runner, source):
        each.reset([2, 0])
        assert each.lengths.tolist() == [0, 3, 0]
    rows = [[4], [6, 6], None]
    assert np.abs(runner.prefill(rows) - source.prefill(rows)).max() < FP32


def test_rows_go_apart_where_padding_would_cost_more() -> None:
    def apart(*counts: int, held: int = 0) -> list[int | None]:
        rows = tuple(np.zeros(count, np.int64) for count in counts)
        return [row for row, _ in rows_by_cost(rows, np.full(len(rows), held))]

    together: list[int | None] = [None]
    assert apart(1, 1) == apart(1, 1, 1, 1, 0, 0) == apart(40, 40, 40) == together
    assert apart(0, 1, 0, 0) == [1]
    assert apart(500, 1, 1) == [0, 1, 2]
    assert apart(500, 0, 0) == [0]
    # A window of several rows is masked and cleared, which long rows pay for.
    assert apart(*[1] * 4, held=2000) == together
    assert apart(*[1] * 4, held=8000) == [0, 1, 2, 3]


def test_a_row_alone_binds_its_own_tokens_only(
    runner_of: RunnerOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others cost it nothing: what is bound is the row's exact prefix, where it lies."""
    runner = runner_of(4)
    runner.prefill([[5] * 3, [5] * 40, [5] * 2, [5] * 9])
    runner.decode([None, None, 7, None])
    shapes = {value.shape()[2] for value in runner._bindings["decode"].get_outputs()[1:]}
    assert shapes == {3}
    starts = [value.data_ptr() for value in runner._bindings["decode"].get_outputs()[1:]]
    stride = runner._cache._stride_tokens  # type: ignore[union-attr]
    assert starts == [b.ctypes.data + 2 * stride * 24 * 4 for b in runner._cache._buffers]  # type: ignore[union-attr]


def test_a_failed_row_takes_the_others_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """All or nothing, with states that earlier rows have moved on already."""
    bundle = exported_family("kimi_linear").bundle
    runner, plain = (
        OnnxRunner(GraphSessions(bundle, threads=1), batch=2, capacity=200) for _ in range(2)
    )
    for each in (runner, plain):
        each.prefill([[5, 6], [7]])
    real, calls = onnx_runner.run_bound, []

    def run(*given: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*given)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(onnx_runner, "run_bound", run)
        runner.prefill([[4] * 100, [3]])
    assert len(calls) == 2 and runner.lengths.tolist() == [2, 1]
    np.testing.assert_array_equal(runner.decode([9, 9]), plain.decode([9, 9]))


def test_the_window_narrows_when_long_rows_are_gone(runner_of: RunnerOf) -> None:
    runner = runner_of(3, capacity=700)
    rows = [[5] * 600, [6] * 9, [7] * 4]
    runner.prefill(rows)
    kept = [runner.cached_rows(1, row) for row in (1, 2)]
    wide = runner._cache._stride_tokens  # type: ignore[union-attr]
    runner.reset([0])
    runner.decode([1, 2, 3])
    assert wide >= 600 and runner._cache._stride_tokens == 64  # type: ignore[union-attr]
    for row, rows_before in zip((1, 2), kept, strict=True):
        np.testing.assert_array_equal(runner.cached_rows(1, row)[:-1], rows_before)


@pytest.mark.parametrize("rows", [[2], [-1], [0, 2], [True], [0.0]])
def test_no_such_row(runner_of: RunnerOf, source_of: Any, rows: list[Any]) -> None:
    for runner in (runner_of(2), source_of(2)):
        runner.prefill([[5, 8], [7]])
        with pytest.raises(InputError, match="RUN-ROW"):
            runner.reset(rows)
        assert runner.lengths.tolist() == [2, 1]
