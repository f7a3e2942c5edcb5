"""RUN faults: a call that is refused has changed neither a length nor one byte of the cache.

Ids are those of the fault list. RUN 09-16, the poisoned caches, are tests/runtime/test_poison.py;
RUN 17-21, 23 and 25 are tests/runtime/test_onnx_runner.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from mla_deploy.errors import EnvironmentFailure, GateError
from mla_deploy.runtime import OnnxRunner, open_runner
from mla_deploy.runtime.binding import run_bound
from mla_deploy.runtime.sessions import GraphSessions
from tests.exported import exported
from tests.faults.refused import refused
from tests.tiny import VOCAB_SIZE

CAPACITY = 8


@pytest.fixture(scope="module")
def sessions() -> GraphSessions:
    return GraphSessions(exported().bundle, threads=1)


@pytest.fixture
def runner(sessions: GraphSessions) -> OnnxRunner:
    """Two rows that hold 5 and 3 of their 8 tokens."""
    opened = OnnxRunner(sessions, batch=2, capacity=CAPACITY)
    opened.prefill([[5, 8, 2, 1, 9], [7, 1, 4]])
    return opened


def state(runner: OnnxRunner) -> str:
    """A hash of every byte a runner keeps: the whole buffers, the stride and the lengths."""
    cache = runner._cache
    digest = hashlib.sha256(runner.lengths.tobytes() + bytes([cache._stride_tokens]))
    for buffer in cache._buffers:
        digest.update(buffer.tobytes())
    return digest.hexdigest()


Act = Callable[[OnnxRunner], Any]

REFUSALS: list[tuple[str, str, Act]] = [
    ("F-RUN-01-empty-row", "RUN-EMPTY", lambda r: r.prefill([[1, 2], []])),
    ("F-RUN-01-all-empty", "RUN-EMPTY", lambda r: r.prefill([[], []])),
    ("F-RUN-02-no-rows", "RUN-BATCH", lambda r: r.prefill([])),
    ("F-RUN-02-too-few", "RUN-BATCH", lambda r: r.decode([1])),
    ("F-RUN-02-too-many", "RUN-BATCH", lambda r: r.prefill([[1], [2], [3]])),
    ("F-RUN-02-not-rows", "RUN-BATCH", lambda r: r.prefill(7)),
    ("F-RUN-02-not-tokens", "RUN-BATCH", lambda r: r.decode(7)),
    ("F-RUN-03-negative", "RUN-TOKEN", lambda r: r.prefill([[1], [2, -1]])),
    ("F-RUN-03-decode-negative", "RUN-TOKEN", lambda r: r.decode([1, -1])),
    ("F-RUN-04-vocab", "RUN-TOKEN", lambda r: r.decode([VOCAB_SIZE, 1])),
    ("F-RUN-04-beyond-64-bits", "RUN-TOKEN", lambda r: r.decode([2**64, 1])),
    ("F-RUN-04-uint64", "RUN-TOKEN", lambda r: r.prefill([np.array([2**63], "u8"), [1]])),
    ("F-RUN-06-capacity-plus-one", "RUN-OVERFLOW", lambda r: r.prefill([[1] * 4, [1]])),
    ("F-RUN-08-one-row-full", "RUN-OVERFLOW", lambda r: r.prefill([[1], [1] * 6])),
    ("F-RUN-24-float", "RUN-TOKEN", lambda r: r.prefill([[1.0], [2]])),
    ("F-RUN-24-bool", "RUN-TOKEN", lambda r: r.decode([True, False])),
    ("F-RUN-24-text", "RUN-TOKEN", lambda r: r.prefill(["ab", "c"])),
    ("F-RUN-24-all-idle", "RUN-EMPTY", lambda r: r.decode([None, None])),
    ("F-RUN-24-nested", "RUN-TOKEN", lambda r: r.prefill([[[1, 2]], [[3, 4]]])),
    ("F-RUN-24-ragged-row", "RUN-TOKEN", lambda r: r.prefill([[1, [2, 3]], [4]])),
]  # fmt: skip


@pytest.mark.parametrize(("code", "act"), [c[1:] for c in REFUSALS], ids=[c[0] for c in REFUSALS])
def test_refused_before_anything_changes(runner: OnnxRunner, code: str, act: Act) -> None:
    before = state(runner)
    error = refused(lambda: act(runner), code)
    assert error.hint
    assert state(runner) == before


def test_F_RUN_05_prompt_of_exactly_the_capacity(sessions: GraphSessions) -> None:
    opened = OnnxRunner(sessions, batch=1, capacity=CAPACITY)
    assert np.isfinite(opened.prefill([[3] * CAPACITY])).all()
    assert opened.lengths.tolist() == [CAPACITY]


def test_F_RUN_07_decode_at_capacity(sessions: GraphSessions) -> None:
    opened = OnnxRunner(sessions, batch=1, capacity=CAPACITY)
    opened.prefill([[3] * CAPACITY])
    before = state(opened)
    error = refused(lambda: opened.decode([1]), "RUN-OVERFLOW", "CacheOverflow", "row 0")
    assert error.details == {"row": 0, "length": 8, "new_tokens": 1, "capacity": 8}
    assert state(opened) == before


def test_F_RUN_08_others_go_on_after_a_full_row(runner: OnnxRunner) -> None:
    refused(lambda: runner.prefill([[1] * 4, [1]]), "RUN-OVERFLOW", "row 0")
    runner.prefill([[1] * 3, [1]])
    assert runner.lengths.tolist() == [8, 4]


def test_F_RUN_06_no_overflow_ever_alters_a_byte(sessions: GraphSessions) -> None:
    """Goal R13: 200 attempts of random shape, refused as a whole, chunked or not."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        batch, capacity = int(rng.integers(1, 5)), int(rng.integers(1, 30))
        opened = OnnxRunner(sessions, batch=batch, capacity=capacity, chunk=int(rng.integers(1, 9)))
        held = rng.integers(1, capacity + 1, batch)
        opened.prefill([[1] * int(count) for count in held])
        for cached in opened._cache._buffers:
            cached[cached == 0] = 1e-3  # so that a stray zero would show
        before = state(opened)
        more = np.minimum(capacity - held, rng.integers(1, 9, batch)).clip(1)
        full = int(rng.integers(0, batch))
        more[full] = capacity - held[full] + int(rng.integers(1, 20))
        rows = [[2] * int(count) for count in more]
        refused(partial(opened.prefill, rows), "RUN-OVERFLOW")
        assert state(opened) == before


@pytest.mark.parametrize(
    ("code", "options"),
    [
        ("RUN-BATCH", {"batch": 0}),
        ("RUN-BATCH", {"batch": -3}),
        ("RUN-BATCH", {"batch": "2"}),
        ("RUN-CAPACITY", {"capacity": 0}),
        ("RUN-CAPACITY", {"capacity": 2.5}),
        ("RUN-CHUNK", {"chunk": 0}),
        ("RUN-THREADS", {"threads": 0}),
        ("RUN-THREADS", {"threads": 1025}),
        ("SHAPE-OVERFLOW", {"capacity": 2**40, "batch": 2**40}),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_F_RUN_02_sizes_that_no_runner_has(code: str, options: dict[str, Any]) -> None:
    refused(lambda: open_runner(exported().bundle, **options), code)


class _Failing:
    """A session whose run fails with what ONNX Runtime would say."""

    def __init__(self, said: str) -> None:
        self._said = said

    def run_with_iobinding(self, _binding: object) -> None:
        raise RuntimeError(self._said)


def test_F_RUN_26_a_graph_that_cannot_run() -> None:
    with pytest.raises(GateError, match="RUN-STEP"):
        run_bound(_Failing("Non-zero status code: indices out of range"), None)


def test_F_RUN_26_no_memory_for_a_step() -> None:
    with pytest.raises(EnvironmentFailure, match="RUN-MEMORY"):
        run_bound(_Failing("Failed to allocate memory for requested buffer of size 9"), None)
