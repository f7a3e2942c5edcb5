"""A cache that does not fit is refused before it is reserved, with what would fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mla_deploy import machine, open_runner
from mla_deploy.errors import EnvironmentFailure
from mla_deploy.runtime import OnnxRunner
from mla_deploy.runtime.memory_fit import require_memory
from tests.exported import exported, exported_family

ROW = 2 * 24 * 4  # layers x width x fp32, of the bundle
RunnerOf = Callable[..., OnnxRunner]


def weights() -> int:
    return exported().bundle.files["weights.safetensors"].bytes


def refused(monkeypatch: pytest.MonkeyPatch, free: int, **sizes: int) -> EnvironmentFailure:
    monkeypatch.setattr(machine, "available_bytes", lambda: free)
    reserved: list[Any] = []
    with monkeypatch.context() as patched, pytest.raises(EnvironmentFailure) as caught:
        patched.setattr(np, "zeros", lambda *given: reserved.append(given))
        open_runner(exported().bundle, threads=1, **sizes)
    assert caught.value.code == "RUN-MEMORY" and not reserved
    return caught.value


def test_says_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused(monkeypatch, weights() + 100 * ROW, batch=8, capacity=40)
    assert error.details["fits_capacity"] == 12  # 8 x 12 rows, of 100
    assert error.details["fits_batch"] == 2
    assert "capacity 12 or batch 2" in error.hint
    open_runner(exported().bundle, batch=8, capacity=12, threads=1)
    open_runner(exported().bundle, batch=2, capacity=40, threads=1)
    refused(monkeypatch, weights() + 100 * ROW, batch=8, capacity=13)
    refused(monkeypatch, weights() + 100 * ROW, batch=3, capacity=40)


def test_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused(monkeypatch, weights() + 1, batch=1, capacity=1)
    assert (error.details["fits_capacity"], error.details["fits_batch"]) == (0, 0)
    assert "not one token fits" in error.hint


def test_weights_that_do_not_fit_leave_the_cache_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read from disk at every step, whatever the cache is."""
    monkeypatch.setattr(machine, "available_bytes", lambda: 100 * ROW)
    assert weights() > 100 * ROW
    assert open_runner(exported().bundle, capacity=100, threads=1).cache_bytes == 100 * ROW
    assert refused(monkeypatch, 100 * ROW, batch=1, capacity=101).details["fits_capacity"] == 100


def test_unknown_memory_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda: None)
    assert open_runner(exported().bundle, batch=4, capacity=90, threads=1).batch == 4


def test_rings_and_states_do_not_grow_with_the_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = open_runner(exported_family("kimi_linear").bundle, capacity=8, threads=1)._spec
    monkeypatch.setattr(machine, "available_bytes", lambda: spec.bytes(3, 1) - 1)
    with pytest.raises(EnvironmentFailure, match="RUN-MEMORY") as caught:
        require_memory(spec, 3, 50, 10**12)
    assert caught.value.details["fits_capacity"] == 0
    assert caught.value.details["fits_batch"] == (spec.bytes(3, 1) - 1) // spec.bytes(1, 50)
