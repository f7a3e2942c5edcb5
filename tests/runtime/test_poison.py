"""What lies beyond a row's length is never read as a value (RUN 09-13, goal R12).

In absorbed attention the cache is key and value at once, so masking the score is not enough:
0 x NaN is NaN. Here every stale slot is filled with poison before every call, and the results must
be the same bits as with zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mla_deploy.runtime import OnnxRunner
from mla_deploy.runtime.cache import GrowingCache
from mla_deploy.runtime.sessions import GraphSessions
from tests.exported import GROWING, HALF_SPLIT, PLAIN, exported
from tests.tiny import VOCAB_SIZE

POISONS = ("nan", "inf", "huge", "random")
SHAPES = 84  # x 3 layouts x 2 calls each: 504 poisoned calls


def poisoned(runner: OnnxRunner, poison: str, rng: np.random.Generator) -> None:
    """Fill every slot at or beyond each row's length, in the window and behind it."""
    cache = runner._cache
    if isinstance(cache, GrowingCache):
        for array in cache._arrays:
            for row, length in enumerate(runner.lengths):
                part = array[row, 0, length:]
                part[...] = values(poison, part.shape, array.dtype, rng)
        return
    stride = cache._stride_tokens
    for buffer, tensor in zip(cache._buffers, cache.spec.tensors, strict=True):
        kept = buffer.copy()
        buffer[:] = values(poison, buffer.shape, buffer.dtype, rng)
        for row, length in enumerate(runner.lengths):
            start = row * stride * tensor.width
            end = start + int(length) * tensor.width
            buffer[start:end] = kept[start:end]


def values(poison: str, shape: Any, dtype: Any, rng: np.random.Generator) -> np.ndarray:
    wide = {
        "zero": np.zeros(shape, np.float32),
        "nan": np.full(shape, np.nan, np.float32),
        "inf": np.full(shape, -np.inf, np.float32),
        "huge": np.full(shape, 1e30, np.float32),
        "random": rng.standard_normal(shape).astype(np.float32),
    }[poison]
    if dtype == np.uint8:  # codes: any value is a number, their scales hold the poison
        return rng.integers(0, 256, shape, np.uint8) if poison != "zero" else np.zeros(shape, dtype)
    if dtype == np.uint16:
        return (np.ascontiguousarray(wide).view(np.uint32) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):  # 1e30 becomes Inf in fp16, which is poison too
        return wide.astype(dtype)


def run(sessions: GraphSessions, poison: str, seed: int) -> list[np.ndarray]:
    """A random batch, random prompts, random graph, three calls; poison before each."""
    rng = np.random.default_rng(seed)
    batch = int(rng.integers(1, 5))
    graph = [None, "decode", "prefill"][int(rng.integers(0, 3))]
    runner = OnnxRunner(sessions, batch=batch, capacity=90, chunk=24, graph=graph)
    noise = np.random.default_rng(seed + 1)
    found = []
    for longest in (int(rng.integers(1, 40)), int(rng.integers(1, 40))):
        rows = [
            rng.integers(0, VOCAB_SIZE, int(rng.integers(1, longest + 1))).tolist()
            for _ in range(batch)
        ]
        poisoned(runner, poison, noise)
        found.append(runner.prefill(rows))
    poisoned(runner, poison, noise)
    found.append(runner.decode(rng.integers(0, VOCAB_SIZE, batch).tolist()))
    found += [runner.cached_rows(layer, row) for layer in range(2) for row in range(batch)]
    return found


@pytest.mark.parametrize("options", [PLAIN, HALF_SPLIT, GROWING], ids=["plain", "half", "grow"])
def test_stale_slots_are_never_read(options: dict[str, Any]) -> None:
    sessions = GraphSessions(exported(**options).bundle, threads=1)
    for seed in range(SHAPES):
        wanted = run(sessions, "zero", seed)
        poison = POISONS[seed % len(POISONS)]
        found = run(sessions, poison, seed)
        for one, other in zip(wanted, found, strict=True):
            assert np.isfinite(other).all(), (seed, poison)
            np.testing.assert_array_equal(other, one, err_msg=f"seed {seed}")


@pytest.mark.parametrize("graph", ["decode", "prefill"])
def test_idle_rows_of_a_poisoned_cache(graph: Any) -> None:
    """RUN 14-16: 0, 1, B-1 and all rows without new tokens; row 2 has never had one."""
    sessions = GraphSessions(exported().bundle, threads=1)
    for idle in ((), (1,), (0, 1), (1, 2), (0, 1, 2)):
        results = []
        for poison in ("zero", "nan"):
            runner = OnnxRunner(sessions, batch=3, capacity=40)
            runner.step(np.full((3, 4), 5), np.array([4, 2, 0]), graph)
            poisoned(runner, poison, np.random.default_rng(0))
            new_B = np.array([0 if row in idle else 1 + row for row in range(3)])
            width = max(1, int(new_B.max()))
            results.append(runner.step(np.full((3, width), 9), new_B, graph))
        np.testing.assert_array_equal(results[0], results[1])
        assert not results[1][list(idle)].any()
        assert np.isfinite(results[1]).all()
