"""What an RMS norm makes of its weight: asked of the module itself, not of its name."""

from __future__ import annotations

import copy

import torch
from torch import nn

NEUTRAL = (1.0, 0.0)  # a norm multiplies by w, or by 1 + w
_EXACT = 1e-5


def neutral_weight(norm: nn.Module, width: int) -> float | None:
    """The weight with which `norm`, of rows `width` wide, only divides; None where it is no norm
    that multiplies each channel by w or by 1 + w."""
    generator = torch.Generator().manual_seed(0)
    x_XK = torch.randn(3, width, generator=generator)
    weight_K = torch.rand(width, generator=generator) + 0.5
    for neutral in NEUTRAL:
        plain, weighted = (normed(norm, x_XK, weight) for weight in (neutral, weight_K))
        if plain is None or weighted is None:
            return None
        if is_near(weighted, plain * (weight_K + 1.0 - neutral)):
            return neutral
    return None


def normed(
    norm: nn.Module, x_XL: torch.Tensor, weight: torch.Tensor | float | None
) -> torch.Tensor | None:
    """What `norm` makes of `x_XL` with another weight; None where it wants more than `x_XL`."""
    probe = copy.copy(norm)
    if weight is not None:
        filled = torch.full(x_XL.shape[-1:], weight) if isinstance(weight, float) else weight
        given = nn.Parameter(filled, requires_grad=False)
        probe.__dict__["_parameters"] = {**norm._parameters, "weight": given}
    try:
        found: torch.Tensor = probe(x_XL)
    except (TypeError, RuntimeError, ValueError, AttributeError):
        return None
    return found if isinstance(found, torch.Tensor) and found.shape == x_XL.shape else None


def is_near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether two results of a norm are one, but for arithmetic; zeros never are."""
    return bool((found - wanted).norm() <= _EXACT * wanted.norm()) and bool(wanted.norm() > 0)
