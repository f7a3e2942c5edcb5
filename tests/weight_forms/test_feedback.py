"""Rounding with error feedback: nearer on the inputs it was fitted to, and on others like them."""

from __future__ import annotations

import pytest
import torch

from mla_deploy.weight_forms.feedback import rounded_with_feedback, upper_factor
from mla_deploy.weight_forms.form import PER_CHANNEL, WeightForm
from mla_deploy.weight_forms.rounding import dequantized, quantized

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


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.spelling)
def test_products_are_nearer_on_inputs_of_the_same_kind(form: WeightForm) -> None:
    fitted_to, unseen = inputs(3), inputs(4)
    found = rounded_with_feedback(weight(), upper_factor(fitted_to.T @ fitted_to), form)
    plain = quantized(weight(), form)
    assert found.values.dtype == plain.values.dtype
    assert found.scales.shape == plain.scales.shape
    errors = [
        float(((dequantized(one, form) - weight()) @ unseen.T).norm()) for one in (plain, found)
    ]
    assert errors[1] < 0.93 * errors[0]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.spelling)
def test_independent_inputs_leave_nothing_to_make_good(form: WeightForm) -> None:
    """Then it is rounding to nearest, bit for bit."""
    found = rounded_with_feedback(weight(), upper_factor(3.0 * torch.eye(COLUMNS)), form)
    plain = quantized(weight(), form)
    assert torch.equal(found.values.float(), plain.values.float())
    assert torch.equal(found.scales, plain.scales)


def test_inputs_never_seen_are_rounded_to_nearest() -> None:
    """Their columns stay what they are, and take no other's error."""
    seen = inputs(3)
    seen[:, 5:7] = 0.0
    form = WeightForm("int8", PER_CHANNEL)
    found = rounded_with_feedback(weight(), upper_factor(seen.T @ seen), form)
    plain = quantized(weight(), form)
    assert torch.equal(found.values[:, 5:7], plain.values[:, 5:7])
    assert not torch.equal(found.values, plain.values)


def test_moments_that_say_nothing_give_the_identity() -> None:
    for moments in (torch.full((8, 8), torch.nan), torch.full((8, 8), torch.inf)):
        assert torch.equal(upper_factor(moments), torch.eye(8, dtype=torch.float64))
    assert bool(upper_factor(torch.zeros(8, 8)).isfinite().all())
    one_direction = torch.ones(8, 8)
    assert bool(upper_factor(one_direction).isfinite().all())
