"""Rounding, against the same written out in fp64, block by block."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mla_deploy.weight_forms.form import PER_CHANNEL, WeightForm, parse_plan
from mla_deploy.weight_forms.rounded import PlanRounding
from mla_deploy.weight_forms.rounding import dequantized, quantized

Doubles = NDArray[np.float64]
FORMS = [
    WeightForm(kind, block, symmetric)
    for kind in ("int4", "int8")
    for block in (32, 128, PER_CHANNEL)
    for symmetric in (True, False)
]


def weights(rows: int = 5, columns: int = 72) -> torch.Tensor:
    """Normal values, one row of zeros, one of one sign, one with a value far out."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))
    values[0] = 0.0
    values[1] = values[1].abs() + 0.5
    values[2, 7] = 40.0
    return values


def nearest(block: Doubles, scale: float, form: WeightForm) -> Doubles:
    half = 2 ** (form.bits - 1)
    return np.clip(np.rint(block / scale), -half, half - 1) * scale


def reference(block: Doubles, form: WeightForm) -> Doubles:
    """One block, rounded as the formulas of `rounding.py` say."""
    largest = np.abs(block).max()
    if not form.symmetric:
        most = 2**form.bits - 1
        low, high = min(block.min(), 0.0), max(block.max(), 0.0)
        scale = (high - low) / most or 1.0
        zero = np.clip(np.rint(-low / scale), 0, most)
        return (np.clip(np.rint(block / scale) + zero, 0, most) - zero) * scale
    if form.bits == 8:
        return nearest(block, largest / 127.0 or 1.0, form)
    tried = [nearest(block, largest / d or 1.0, form) for d in (7.0, 7.5, 8.0, 8.75)]
    return min(tried, key=lambda found: float(((found - block) ** 2).sum()))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.spelling)
def test_rounds_as_the_reference_does(form: WeightForm) -> None:
    weight = weights()
    found = dequantized(quantized(weight, form), form).double().numpy()
    width = form.width(weight.shape[1])
    for row, wanted in zip(found, weight.double().numpy(), strict=True):
        for start in range(0, len(row), width):
            block = wanted[start : start + width]
            error = np.abs(row[start : start + width] - reference(block, form))
            # fp32 may round a value in the middle of two the other way.
            step = np.abs(block).max() / 2 ** (form.bits - 1)
            assert np.median(error) <= 1e-6 * max(np.abs(block).max(), 1e-6)
            assert (error > 1.01 * 2 * step).sum() == 0


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.spelling)
def test_the_error_is_that_of_a_grid(form: WeightForm) -> None:
    """Half a step of uniform rounding: no value is off by more than its block's own step."""
    weight = weights()[3:]
    found = dequantized(quantized(weight, form), form)
    step = weight.abs().max() / (2 ** (form.bits - 1) - 1)
    assert (found - weight).abs().max() <= 1.25 * step
    assert 0.0 < (found - weight).square().mean().sqrt() <= 0.4 * step


def test_zeros_stay_zeros_and_scales_are_positive() -> None:
    for form in (*FORMS, WeightForm("fp8", 128)):
        found = quantized(weights(), form)
        assert bool((found.scales > 0).all())
        assert not dequantized(found, form)[0].any()


def test_fp8_keeps_three_bits_after_the_first() -> None:
    form = WeightForm("fp8", 128)
    weight = weights()[3:]
    found = dequantized(quantized(weight, form), form)
    normal = weight.abs() > weight.abs().max() * 2.0**-6
    error = ((found - weight).abs() / weight.abs())[normal]
    assert 0.0 < error.max() <= 1 / 16 + 1e-6


def test_a_better_scale_is_chosen_for_four_bits() -> None:
    """Against the scale that cuts nothing, the error is smaller and never larger."""
    form = WeightForm("int4", 32)
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(4))
    plain = weight.abs().amax(-1, keepdim=True) / 7
    uncut = (weight / plain).round() * plain
    chosen = dequantized(quantized(weight, form), form)
    before, after = ((x - weight).square().sum(-1) for x in (uncut, chosen))
    assert bool((after <= before * (1 + 1e-5)).all())
    assert after.sum() < 0.95 * before.sum()


def rounding(spelling: str = "int4", *, tied: bool = False) -> PlanRounding:
    return PlanRounding(parse_plan(spelling), heads=2, nope=32, router_rows=6, tied=tied)


def test_each_role_is_rounded_in_its_form() -> None:
    weight = torch.randn(80, 64, generator=torch.Generator().manual_seed(5))
    four, eight = (
        dequantized(quantized(weight, form), form)
        for form in (WeightForm("int4", 32), WeightForm("int8", 32))
    )
    rounded = rounding()
    assert torch.equal(rounded("model.layers.0.mlp.up_proj.weight", weight), four)
    assert torch.equal(rounded("lm_head.weight", weight), four)
    assert torch.equal(rounded("model.embed_tokens.weight", weight), eight)
    assert torch.equal(rounding(tied=True)("lm_head.weight", weight), eight)


def test_routers_norms_and_indexers_are_left_alone() -> None:
    rounded = rounding()
    for name, shape in (
        ("model.layers.1.mlp.gate.weight", (6, 64)),
        ("model.layers.1.input_layernorm.weight", (64,)),
        ("model.layers.1.self_attn.indexer.wk.weight", (80, 64)),
        ("model.layers.1.mlp.up_proj.weight", (80, 8)),
    ):
        weight = torch.randn(shape)
        assert rounded(name, weight) is weight


def test_the_halves_of_kv_b_are_rounded_along_what_their_products_sum() -> None:
    weight = torch.randn(2 * (32 + 24), 64, generator=torch.Generator().manual_seed(6))
    found = rounding()("model.layers.0.self_attn.kv_b_proj.weight", weight)
    form = WeightForm("int4", 32)
    heads = zip(weight.view(2, 56, 64), found.view(2, 56, 64), strict=True)
    for head, (was, now) in enumerate(heads):
        uk = was[:32].T
        assert torch.equal(now[:32].T, dequantized(quantized(uk, form), form)), head
        assert torch.equal(now[32:], dequantized(quantized(was[32:], form), form)), head
