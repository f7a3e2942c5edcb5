"""Half precision is judged beside what it costs the source itself, rounded in the same places."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mla_deploy.validate.difference import LogitDifference, logit_difference
from mla_deploy.validate.gates import gate_for
from mla_deploy.validate.parity import CaseResult
from mla_deploy.validate.report import rounding_loss, top_one

GATE = gate_for("fp16")
RNG = np.random.default_rng(3)
SOURCE_XV = RNG.normal(size=(400, 50)).astype(np.float32)


def moved(size: float) -> LogitDifference:
    """Logits that are off by noise of that size."""
    noise = RNG.normal(size=SOURCE_XV.shape).astype(np.float32)
    return logit_difference(SOURCE_XV, SOURCE_XV + size * noise, GATE.rel_l2)


def case(bundle: LogitDifference, source: LogitDifference | None) -> CaseResult:
    return CaseResult(
        name="case", batch=1, tokens=400, seconds=0.0, failures=(), logits=bundle, rounding=bundle,
        max_abs_bound=None, cache=None, source_rounding=source,
    )  # fmt: skip


def test_a_model_that_rounding_moves_little_is_held_to_the_gate() -> None:
    small = moved(1e-3)
    assert small.mean_kl < GATE.mean_kl / 10
    loss, top1 = rounding_loss((case(small, small),), GATE), top_one((case(small, small),), GATE)
    assert loss is not None and loss.wanted_mean_kl == GATE.mean_kl
    assert top1.wanted == GATE.top1 and loss.passed and top1.passed


def test_a_model_that_rounding_moves_far_is_held_to_itself() -> None:
    far = moved(0.15)
    assert far.mean_kl > GATE.mean_kl and far.flips > 4  # the gate alone would say no
    results = (case(far, far),)
    loss, top1 = rounding_loss(results, GATE), top_one(results, GATE)
    assert loss is not None and loss.passed and top1.passed
    assert loss.wanted_mean_kl == pytest.approx(1.5 * far.mean_kl)
    assert top1.wanted == pytest.approx(1 - 1.5 * (1 - top1.share))


def test_a_bundle_that_loses_twice_as_much_is_refused() -> None:
    source, bundle = moved(0.1), moved(0.3)
    results = (case(bundle, source),)
    loss, top1 = rounding_loss(results, GATE), top_one(results, GATE)
    assert loss is not None and not loss.passed and not top1.passed
    # Numbers that are not finite in the source excuse nothing.
    broken = replace(source, mean_kl=float("inf"))
    loss = rounding_loss((case(bundle, broken),), GATE)
    assert loss is not None and loss.wanted_mean_kl == GATE.mean_kl and not loss.passed


def test_without_rounding_nothing_is_excused() -> None:
    far = replace(case(moved(0.15), None), rounding=None)
    assert rounding_loss((far,), GATE) is None
    assert top_one((far,), GATE).wanted == GATE.top1
