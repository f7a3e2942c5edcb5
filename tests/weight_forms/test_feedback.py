"""Rounding with error feedback: nearer on the inputs it was fitted to, and on others like them."""

from __future__ import annotations

import pytest
import torch

from mla_deploy.weight_forms.feedback import Feedback, rounded_with_feedback
from mla_deploy.weight_forms.form import PER_CHANNEL, WeightForm
from mla_deploy.weight_forms.rounding import Quantized, dequantized, quantized

FORMS = [
    *(WeightForm("int4", block, symmetric) for block in (32, 128) for symmetric in (True, False)),
    WeightForm("int8", 64),
    WeightForm("int8", PER_CHANNEL),
    WeightForm("fp8", 128),
]
COLUMNS = 200  # the last block is short


def inputs(seed: int, rows: int = 1500) -> torch.Tensor:
    """Correlated, some directions far stronger than others."""
    mixing = torch.randn(COLUMNS, COLUMNS, generator=torch.Generator().manual_seed(1))
    mixing *= torch.linspace(0.1, 3.0, COLUMNS)
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed)) @ mixing


def weight() -> torch.Tensor:
    return torch.randn(24, COLUMNS, generator=torch.Generator().manual_seed(2))


def fitted(moments: torch.Tensor, form: WeightForm) -> Quantized:
    return rounded_with_feedback(weight(), Feedback.of(moments, form.width(COLUMNS)), form)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.spelling)
def test_products_are_nearer_on_inputs_of_the_same_kind(form: WeightForm) -> None:
    fitted_to, unseen = inputs(3), inputs(4)
    found = fitted(fitted_to.T @ fitted_to, form)
    plain = quantized(weight(), form)
    assert found.values.dtype == plain.values.dtype
    assert found.scales.shape == plain.scales.shape
    errors = [
        float(((dequantized(one, form) - weight()) @ unseen.T).norm()) for one in (plain, found)
    ]
    assert errors[1] < 0.93 * errors[0]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.spelling)
def test_independent_inputs_leave_nothing_to_make_good(form: WeightForm) -> None:
    """Then it is rounding to nearest, bit for bit; with zero points, on a grid that is searched."""
    found, plain = fitted(3.0 * torch.eye(COLUMNS), form), quantized(weight(), form)
    if not form.symmetric:
        errors = [(dequantized(one, form) - weight()).square().sum() for one in (found, plain)]
        assert float(errors[0]) < 0.99 * float(errors[1])
        return
    assert torch.equal(found.values.float(), plain.values.float())
    assert torch.equal(found.scales, plain.scales)


def test_inputs_never_seen_are_rounded_to_nearest() -> None:
    """Their columns stay what they are, and take no other's error."""
    seen = inputs(3)
    seen[:, 5:7] = 0.0
    form = WeightForm("int8", PER_CHANNEL)
    found = fitted(seen.T @ seen, form)
    plain = quantized(weight(), form)
    assert torch.equal(found.values[:, 5:7], plain.values[:, 5:7])
    assert not torch.equal(found.values, plain.values)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.spelling)
@pytest.mark.parametrize("moments", [torch.nan, torch.inf])
def test_moments_that_say_nothing_leave_rounding_to_nearest(
    moments: float, form: WeightForm
) -> None:
    found = fitted(torch.full((COLUMNS, COLUMNS), moments), form)
    plain = fitted(torch.eye(COLUMNS), form)
    assert torch.equal(found.values.float(), plain.values.float())


@pytest.mark.parametrize("moments", [torch.zeros(8, 8), torch.ones(8, 8)])
def test_moments_of_no_or_one_direction_can_be_used(moments: torch.Tensor) -> None:
    assert bool(Feedback.of(moments, 4).upper_KK.isfinite().all())


def test_large_inputs_go_first_by_whole_blocks() -> None:
    moments = torch.diag(torch.tensor([1.0, 2.0, 1.0, 9.0, 8.0, 7.0, 30.0]))
    order = Feedback.of(moments, 3).order_K  # blocks of 3, 3 and 1
    assert order.tolist() == [6, 3, 4, 5, 1, 0, 2]


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_a_large_input_meets_is_rounded_best(symmetric: bool) -> None:
    form = WeightForm("int4", 32, symmetric)
    moments = torch.eye(COLUMNS)
    moments[40, 40] = 1e4
    even, found = (
        (dequantized(fitted(m, form), form) - weight()).abs()[:, 40].mean()
        for m in (torch.eye(COLUMNS), moments)
    )
    assert float(found) < 0.7 * float(even)
