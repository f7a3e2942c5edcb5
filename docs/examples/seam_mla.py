"""Latent attention through the one function that mla-deploy documents for it.

A model of your own may compute queries, latents and positions as it likes: where it attends it
calls `latent_attention`, and an export caches what is given there.

    mla-deploy export --module docs.examples.seam_mla:model --weights FILE.safetensors --out BUNDLE
"""

from __future__ import annotations

import torch
from torch import nn

from mla_deploy.source import latent_attention

HEADS, NOPE, ROPE, VALUE, LATENT, WIDTH, VOCAB = 4, 16, 8, 16, 24, 64, 128


def turn(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate neighbours: (a, b) by an angle each."""
    even, odd = x[..., ::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


class Model(nn.Module):
    """One layer: token ids [batch, tokens] to logits [batch, tokens, vocab]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.w_q = nn.Linear(WIDTH, HEADS * (NOPE + ROPE))
        self.w_kv_a = nn.Linear(WIDTH, LATENT + ROPE)
        self.norm = nn.LayerNorm(LATENT)
        self.w_kv_b = nn.Parameter(torch.randn(HEADS * (NOPE + VALUE), LATENT) / LATENT**0.5)
        self.w_o = nn.Linear(HEADS * VALUE, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        frequencies = 10_000.0 ** (-torch.arange(0, ROPE, 2) / ROPE)
        angles = torch.arange(ids.shape[1])[:, None] * frequencies
        q = self.w_q(x).unflatten(-1, (HEADS, NOPE + ROPE)).transpose(1, 2)
        query = torch.cat((q[..., :NOPE], turn(q[..., NOPE:], angles)), dim=-1)
        latent, key = self.w_kv_a(x).split((LATENT, ROPE), dim=-1)
        scale = (NOPE + ROPE) ** -0.5
        rope_key = turn(key, angles)
        out = latent_attention(query, self.norm(latent), rope_key, self.w_kv_b, scale=scale)
        return self.head(x + self.w_o(out.transpose(1, 2).flatten(2)))


def model() -> nn.Module:
    """What `--module docs.examples.seam_mla:model` calls."""
    return Model()
