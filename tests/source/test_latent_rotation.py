"""The rotation itself, on small attentions: what it leaves alone, and what cannot be rotated."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import nn

from mla_deploy.errors import InputError
from mla_deploy.source.latent_rotation import (
    block_of,
    latent_paths,
    rotate_module,
    rotated,
)

RANK, ROPE, WIDTH = 24, 4, 32


class Norm(nn.Module):
    """x / rms(x), times w or 1 + w."""

    def __init__(self, width: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.offset = offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
        return x * scale * (self.weight + self.offset)


class Gated(Norm):
    """A norm that wants a gate as well."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        if gate is None:
            raise TypeError("no gate")
        return super().forward(x) * gate


class Attention(nn.Module):
    def __init__(self, norm: nn.Module | None, *, bias: bool = False, rank: int = RANK) -> None:
        super().__init__()
        self.rank = rank
        self.kv_a_proj_with_mqa: nn.Linear | None = nn.Linear(WIDTH, rank + ROPE, bias=bias)
        self.kv_a_layernorm = norm
        self.kv_b_proj = nn.Linear(rank, 40, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The latent, the rope key, and what heads see."""
        assert self.kv_a_proj_with_mqa is not None
        latent, rope_key = self.kv_a_proj_with_mqa(x).split([self.rank, ROPE], dim=-1)
        if self.kv_a_layernorm is not None:
            latent = self.kv_a_layernorm(latent)
        return latent, rope_key, self.kv_b_proj(latent)


@pytest.mark.parametrize(("rank", "block"), [(512, 512), (24, 8), (320, 64), (6, 2)])
def test_it_is_orthogonal_and_mixes_within_blocks(rank: int, block: int) -> None:
    turned_LL = rotated(torch.eye(rank))
    assert block_of(rank) == block
    assert torch.allclose(turned_LL @ turned_LL.T, torch.eye(rank), atol=1e-6)
    assert torch.allclose(turned_LL.abs().max(), torch.tensor(block**-0.5))
    assert int((turned_LL[0] != 0).sum()) == block


def test_a_constant_latent_does_not_meet_in_one_channel() -> None:
    """Which unsigned sums would do."""
    assert rotated(torch.ones(1, 512)).abs().max() < 5


def test_signs_are_the_same_in_every_release() -> None:
    """Bundles of today are held against sources rotated by later releases."""
    told = "".join("+" if value > 0 else "-" for value in rotated(torch.eye(64))[:, 0])
    assert hashlib.sha256(told.encode()).hexdigest().startswith("1535c508bd704e04")


@pytest.mark.parametrize(
    ("norm", "bias"),
    [(Norm(RANK), False), (Norm(RANK, 1.0), True), (None, True), (nn.Identity(), False),
     (nn.RMSNorm(RANK), False), (nn.RMSNorm(RANK, elementwise_affine=False), False)],
)  # fmt: skip
def test_the_model_computes_the_same_over_a_rotated_latent(norm: Any, bias: bool) -> None:
    attention, x = Attention(norm, bias=bias), torch.randn(5, WIDTH)
    with torch.no_grad():
        latent, rope_key, heads = attention(x)
        gains = getattr(norm, "weight", None)
        plain = latent if gains is None else latent / (gains + getattr(norm, "offset", 0.0))
        rotate_module(attention)
        turned, same_key, same_heads = attention(x)
    assert torch.allclose(turned, rotated(plain), atol=1e-5)
    assert not torch.allclose(turned, plain, atol=0.1)
    assert torch.equal(same_key, rope_key)
    assert torch.allclose(same_heads, heads, atol=1e-5)


def shared() -> nn.Module:
    attention = Attention(Norm(RANK))
    attention.kv_a_proj_with_mqa = None
    return attention


def biased() -> nn.Module:
    attention = Attention(Norm(RANK))
    attention.kv_b_proj = nn.Linear(RANK, 40, bias=True)
    return attention


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (lambda: Attention(nn.LayerNorm(RANK)), "LayerNorm"),
        (lambda: Attention(nn.LayerNorm(RANK, bias=False)), "LayerNorm"),
        (lambda: Attention(Gated(RANK)), "Gated"),
        (shared, "another layer"),
        (biased, "bias"),
        (lambda: Attention(Norm(23), rank=23), "23 wide"),
        (lambda: nn.Linear(2, 2), "has no kv_b_proj"),
    ],
)
def test_what_a_rotation_would_change_is_refused(model: Any, told: str) -> None:
    with pytest.raises(InputError, match=rf"EXP-ROTATE.*{told}"):
        latent_paths(model())
