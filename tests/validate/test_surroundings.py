"""What a report tells beside its judgements: cache forms by hand, what ran, step times."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mla_deploy.runtime.sessions import GraphSessions
from mla_deploy.validate import step_times
from mla_deploy.validate.cache_forms import compare_cache
from mla_deploy.validate.opening import open_sessions
from mla_deploy.validate.step_times import measure_steps
from mla_deploy.validate.surroundings import surroundings_of
from tests.exported import Exported, exported


def test_cache_forms_by_hand(made: Exported) -> None:
    """2 layers x (16 + 8) x 4 bytes; 2 layers x 4 heads x (8 + 8 + 8) x 4 bytes."""
    found = compare_cache(made.bundle.manifest, made.bundle.config)
    assert [dataclasses.astuple(form) for form in found.forms] == [
        ("latent", "fp32", 192, True),
        ("latent", "16 bits", 96, False),
        ("full heads", "fp32", 768, False),
        ("full heads", "16 bits", 384, False),
    ]  # fmt: skip
    assert (found.bytes_per_token, found.ratio, found.layers) == (192, 4.0, 2)


def test_cache_forms_of_codes(made: Exported) -> None:
    bundle = exported(cache_dtype="int8").bundle
    found = compare_cache(bundle.manifest, bundle.config)
    own = [form for form in found.forms if form.is_bundle]
    assert [(form.dtype, form.bytes_per_token) for form in own] == [
        ("int8", bundle.manifest["cache"]["bytes_per_token"])
    ]
    assert found.ratio is not None and found.ratio > 4


def test_step_times_are_of_contexts_that_fit(made: Exported) -> None:
    sessions = GraphSessions(made.bundle, threads=1)
    found = measure_steps(sessions)
    assert found is not None
    contexts = [point.context for point in found.points]
    capacity = made.bundle.manifest["cache"]["capacity"]
    assert contexts == sorted(set(contexts)) and contexts[0] == 1
    assert len(contexts) > 1 and contexts[-1] + 1 + found.rounds <= capacity
    assert all(0 < p.min_ms <= p.median_ms <= p.max_ms for p in found.points)
    assert (found.threads, found.cores >= 1) == (1, True)
    assert found.runtime.startswith("ONNX Runtime ") and found.processor


def test_no_step_times_where_nothing_fits() -> None:
    sessions = GraphSessions(exported(capacity=8).bundle, threads=1)
    assert measure_steps(sessions) is None


def test_a_slow_model_is_not_waited_for(made: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_times, "_SECONDS", 0.0)
    found = measure_steps(GraphSessions(made.bundle, threads=1))
    assert found is not None
    assert [point.context for point in found.points] == [1]


def test_what_ran(made: Exported) -> None:
    sessions = GraphSessions(made.bundle, threads=1)
    sessions.session("decode")
    found = surroundings_of(made.bundle, sessions, of_source=True)
    parts = {part.part: part for part in found.ran.parts}
    assert {name: part.state for name, part in parts.items()} == {
        "source": "ran", "decode graph": "ran", "prefill graph": "only read",
    }  # fmt: skip
    assert "CPUExecutionProvider" in parts["decode graph"].where
    assert parts["source"].where.startswith("torch 2.") and "transformers" in parts["source"].where
    assert found.speed is None
    assert found.rewrites["decode"]["absorb_projections"] == 2
    told = surroundings_of(made.bundle, sessions, of_source=False)
    assert "source" not in {part.part for part in told.ran.parts}


def test_a_stand_in_is_called_one_and_not_timed() -> None:
    made = exported(target="rtx-40", dtype="fp16", capacity=64)
    sessions = open_sessions(made.bundle, threads=1)
    sessions.session("decode")
    found = surroundings_of(made.bundle, sessions, of_source=False, timed=True).to_dict()
    parts: dict[str, Any] = {part["part"]: part for part in found["ran"]["parts"]}
    assert "stand-in for rtx-40" in parts["decode graph"]["told"]
    assert parts["engines"]["state"] == "only read"
    assert found["speed"] is None
