"""DeepSeek's own norm, made to do nothing: for any input, in each float format."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

from mla_deploy.compress.constant_norm import RATIO, ConstantNorm, constant_norm

D, L = 96, 33


def projection(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Channels from large to small, as principal axes are."""
    rng = np.random.default_rng(seed)
    down = rng.normal(size=(L - 1, D)) * np.logspace(0, -2, L - 1)[:, None]
    return down, rng.normal(size=L - 1), rng.uniform(0.2, 3.0, D)


def inputs(gain_D: np.ndarray, spike: float) -> np.ndarray:
    """What leaves an RMS norm of weight `gain_D`; with a spike, nearly all in one channel."""
    drawn = np.random.default_rng(1).normal(size=(500, D))
    drawn[:, 3] *= spike
    return drawn / np.sqrt((drawn**2).mean(1, keepdims=True)) * gain_D


def after(found: ConstantNorm, given: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    norm = DeepseekV3RMSNorm(L).to(dtype)
    norm.weight.data.copy_(torch.from_numpy(found.weight))
    before = torch.from_numpy(given @ found.down.T + found.bias).to(dtype)
    with torch.no_grad():
        return np.asarray(norm(before).double().numpy())


def error(ratio: float, dtype: torch.dtype, spike: float = 1.0) -> float:
    down, bias, gain_D = projection()
    given = inputs(gain_D, spike)
    wanted = given @ down.T + bias
    found = constant_norm(down, bias, gain_D, ratio)
    got = after(found, given, dtype)[:, :-1] * found.undo
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("spike", [1.0, 1e3])
def test_within_the_bound_for_any_input(spike: float) -> None:
    for ratio in (2.0**5, 2.0**8):
        assert error(ratio, torch.float32, spike) < D / 2 / ratio**2


@pytest.mark.parametrize(
    ("dtype", "rounds"),
    [(torch.float32, 2e-7), (torch.bfloat16, 3.5e-3), (torch.float16, 4.5e-4)],
)
def test_the_chosen_ratio_costs_what_rounding_costs(dtype: torch.dtype, rounds: float) -> None:
    """Twice rounded is the least a norm in `dtype` does; smaller ratios are worse, in all."""
    assert error(RATIO, dtype) < rounds
    assert error(2.0**2, dtype) > 1.5 * error(RATIO, dtype)


def test_a_ratio_beyond_it_serves_no_format() -> None:
    assert error(2.0**15, torch.float16) > 1.3 * error(RATIO, torch.float16)
    assert error(2.0**15, torch.float32) > 0.5 * error(RATIO, torch.float32)


def test_the_last_channel_is_a_constant_that_carries_a_bias() -> None:
    down, bias, gain_D = projection()
    found = constant_norm(down, bias, gain_D)
    last = after(found, inputs(gain_D, 1.0), torch.float32)[:, -1]
    assert last * found.one == pytest.approx(1.0, abs=1e-6)


def test_nothing_to_carry() -> None:
    found = constant_norm(np.zeros((L - 1, D)), np.zeros(L - 1), np.ones(D))
    got = after(found, inputs(np.ones(D), 1.0), torch.float32)
    assert np.isfinite(got).all() and not got[:, :-1].any()
