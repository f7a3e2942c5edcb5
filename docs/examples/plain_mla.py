"""A small language model with latent attention, written in plain PyTorch as papers write it.

Nothing here knows of caches, graphs or mla-deploy. `mla-deploy export --module
docs.examples.plain_mla:model --weights FILE.safetensors --out BUNDLE` finds the latent in it.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

HEADS, NOPE, ROPE, VALUE, LATENT, WIDTH, VOCAB, LAYERS = 4, 16, 8, 16, 24, 64, 128, 2


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the two halves of the last axis against each other."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Multi-head Latent Attention: one latent and one rotated key a token, shared by all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.w_q = nn.Linear(WIDTH, HEADS * (NOPE + ROPE), bias=False)
        self.w_dkv = nn.Linear(WIDTH, LATENT, bias=False)
        self.norm = nn.RMSNorm(LATENT, eps=1e-6)
        self.w_kr = nn.Linear(WIDTH, ROPE, bias=False)
        self.w_uk = nn.Linear(LATENT, HEADS * NOPE, bias=False)
        self.w_uv = nn.Linear(LATENT, HEADS * VALUE, bias=False)
        self.w_o = nn.Linear(HEADS * VALUE, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q = self.w_q(x).view(batch, tokens, HEADS, NOPE + ROPE).transpose(1, 2)
        q_nope, q_rope = q.split((NOPE, ROPE), dim=-1)
        latent = self.norm(self.w_dkv(x))
        rope_key = rotate(self.w_kr(x), cos, sin)[:, None]
        k_nope = self.w_uk(latent).view(batch, tokens, HEADS, NOPE).transpose(1, 2)
        value = self.w_uv(latent).view(batch, tokens, HEADS, VALUE).transpose(1, 2)
        q = torch.cat((q_nope, rotate(q_rope, cos, sin)), dim=-1)
        k = torch.cat((k_nope, rope_key.expand(-1, HEADS, -1, -1)), dim=-1)
        scores = q @ k.transpose(-1, -2) / (NOPE + ROPE) ** 0.5
        future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
        return self.w_o((weights @ value).transpose(1, 2).reshape(batch, tokens, -1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH, eps=1e-6), nn.RMSNorm(WIDTH, eps=1e-6)
        self.attention = Attention()
        self.up, self.down = nn.Linear(WIDTH, 128, bias=False), nn.Linear(128, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x), cos, sin)
        return x + self.down(functional.silu(self.up(self.norm2(x))))


class Model(nn.Module):
    """Token ids [batch, tokens] to logits [batch, tokens, vocab]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        frequencies = 10_000.0 ** (-torch.arange(0, ROPE, 2) / ROPE)
        angles = torch.arange(ids.shape[1])[:, None] * frequencies
        for block in self.blocks:
            x = block(x, angles.cos(), angles.sin())
        return self.head(self.norm(x))


def model() -> nn.Module:
    """What `--module docs.examples.plain_mla:model` calls."""
    return Model()
