"""The distances, by hand, and the gates that judge them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mla_deploy.errors import IncompatibleError
from mla_deploy.validate.difference import logit_difference, relative_l2
from mla_deploy.validate.gates import GATES, gate_for

NOISE = 1e-5


def logits(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32)


def test_equal_logits() -> None:
    same = logits([1.0, 2.0, 3.0], [0.0, -1.0, 5.0])
    found = logit_difference(same, same.copy(), NOISE)
    assert (found.positions, found.max_abs, found.rel_l2, found.mean_kl) == (2, 0.0, 0.0, 0.0)
    assert (found.flips, found.near_ties, found.largest_logit) == (0, 0, 5.0)


def test_by_hand() -> None:
    """Two tokens at even odds against three to one: KL = ln(2/3)/2 + ln(2)/2."""
    found = logit_difference(logits([0.0, 0.0]), logits([math.log(3.0), 0.0]), NOISE)
    assert found.max_abs == pytest.approx(math.log(3.0))
    assert found.mean_kl == pytest.approx(0.5 * math.log(2 / 3 * 2), abs=1e-6)
    ratio = relative_l2(logits([3.0, 4.0]), logits([3.0, 4.5]))
    assert ratio == pytest.approx(0.1)


def test_a_constant_on_all_logits_is_no_other_distribution() -> None:
    found = logit_difference(logits([1.0, 2.0]), logits([6.0, 7.0]), NOISE)
    assert found.mean_kl == pytest.approx(0.0, abs=1e-9)
    assert found.max_abs == 5.0


def test_flip_and_near_tie() -> None:
    """A flip is excused by a small margin of the reference, never by a large difference."""
    flip = logit_difference(logits([1.0, 0.9]), logits([-50.0, 60.0]), NOISE)
    assert (flip.flips, flip.near_ties) == (1, 0)
    tie = logit_difference(logits([1.0, 1.0 - 1e-6]), logits([1.0 - 1e-6, 1.0]), NOISE)
    assert (tie.flips, tie.near_ties) == (0, 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_infinitely_far(value: float) -> None:
    found = logit_difference(logits([1.0, 2.0]), logits([1.0, value]), NOISE)
    assert found.max_abs == found.rel_l2 == found.mean_kl == math.inf
    assert found.flips == 1
    assert relative_l2(logits([1.0]), logits([value])) == math.inf


def test_zero_reference() -> None:
    assert relative_l2(logits([0.0]), logits([0.0])) == 0.0
    assert relative_l2(logits([0.0]), logits([1.0])) == math.inf


def test_the_absolute_gate_widens_for_large_logits_only() -> None:
    gate = gate_for("fp32")
    assert gate.max_abs_bound(5.0) == 1e-4
    assert gate.max_abs_bound(50.0) == 1e-4
    assert gate.max_abs_bound(500.0) == pytest.approx(1e-3)
    assert gate_for("bf16").max_abs_bound(500.0) is None


def test_gates_are_the_published_ones() -> None:
    """A tolerance is changed here and in the table, on purpose, or not at all."""
    found = {dtype: (g.max_abs, g.rel_l2, g.mean_kl, g.top1) for dtype, g in GATES.items()}
    assert found == {
        "fp32": (1e-4, 1e-5, 1e-7, 1.0),
        "fp16": (None, 1e-2, 1e-3, 0.99),
        "bf16": (None, 3e-2, 5e-3, 0.97),
        "int8": (None, 1e-2, 5e-3, 0.97),
        "int8-tile": (None, 1e-2, 5e-3, 0.97),
        "int8-all": (None, 1e-2, 5e-3, 0.97),
        "int8-static": (None, 1e-2, 5e-3, 0.97),
        "fp8": (None, 3e-2, 1e-2, 0.95),
        "int4": (None, 1e-1, 5e-1, 0.75),
        "int4-all": (None, 1e-1, 5e-1, 0.75),
    }


def test_of_two_dtypes_the_looser_bound_holds() -> None:
    assert gate_for("fp32", "fp32") == GATES["fp32"]
    assert gate_for("bf16", "int8") == GATES["bf16"]
    assert gate_for("fp32", "int8") == GATES["int8"]


def test_no_gate_for_an_unknown_dtype() -> None:
    with pytest.raises(IncompatibleError, match="VAL-DTYPE"):
        gate_for("fp4")
