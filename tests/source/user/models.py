"""Small language models with latent attention, written in the ways that people write it.

All forms compute the same: `Lm(form)` takes the same weights whatever its form, so one stands as
the reference of the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

H, N, R, V, L, D, VOCAB = 3, 8, 4, 6, 10, 24, 40
LONGEST = 64


def rotate_half(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """cos and sin [.., R/2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Weights of one attention; `form` names the function below that uses them."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.w_q = nn.Linear(D, H * (N + R), bias=False)
        self.w_kv_a = nn.Linear(D, L + R, bias=False)
        self.norm = nn.RMSNorm(L, eps=1e-6)
        self.w_kv_b = nn.Linear(L, H * (N + V), bias=False)
        self.w_o = nn.Linear(H * V, D, bias=False)
        self.form = FORMS[form]
        self.scale = (N + R) ** -0.5

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return self.w_o(self.form(self, x, cos, sin))

    def parts(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """q_nope and q_rope [B, S, H, .], latent [B, S, L], rope key [B, S, R]."""
        q = self.w_q(x).view(*x.shape[:2], H, N + R)
        latent, rope_key = self.w_kv_a(x).split((L, R), dim=-1)
        q_rope = rotate_half(q[..., N:], cos.unsqueeze(-2), sin.unsqueeze(-2))
        return q[..., :N], q_rope, self.norm(latent), rotate_half(rope_key, cos, sin)

    def expanded(self, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys without position and values, [B, S, H, .]."""
        made = self.w_kv_b(latent).view(*latent.shape[:2], H, N + V)
        return made[..., :N], made[..., N:]


def causal(tokens: int) -> torch.Tensor:
    return torch.full((tokens, tokens), float("-inf")).triu(1)


def textbook(m: Attention, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[B, H, S, E] and matmul, a mask added."""
    q_nope, q_rope, latent, rope_key = m.parts(x, cos, sin)
    k_nope, value = m.expanded(latent)
    q = torch.cat((q_nope, q_rope), dim=-1).transpose(1, 2)
    k = torch.cat((k_nope, rope_key[:, :, None].expand(-1, -1, H, -1)), dim=-1).transpose(1, 2)
    scores = torch.matmul(q, k.transpose(2, 3)) * m.scale + causal(x.shape[1])
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, value.transpose(1, 2)).transpose(1, 2).flatten(2)


def fused(m: Attention, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """scaled_dot_product_attention, is_causal."""
    q_nope, q_rope, latent, rope_key = m.parts(x, cos, sin)
    k_nope, value = m.expanded(latent)
    q = torch.cat((q_nope, q_rope), dim=-1).transpose(1, 2)
    k = torch.cat((k_nope, rope_key[:, :, None].expand(-1, -1, H, -1)), dim=-1).transpose(1, 2)
    out = functional.scaled_dot_product_attention(q, k, value.transpose(1, 2), is_causal=True)
    return out.transpose(1, 2).reshape(*x.shape[:2], -1)


def fused_mask(m: Attention, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The same with a boolean mask and a scale of its own, heads and rows in one axis."""
    q_nope, q_rope, latent, rope_key = m.parts(x, cos, sin)
    k_nope, value = m.expanded(latent)
    batch, tokens = x.shape[:2]
    q = torch.cat((q_nope, q_rope), dim=-1).transpose(1, 2).reshape(batch * H, tokens, N + R)
    k = torch.cat((k_nope, rope_key[:, :, None].expand(-1, -1, H, -1)), dim=-1)
    k = k.transpose(1, 2).reshape(batch * H, tokens, N + R)
    v = value.transpose(1, 2).reshape(batch * H, tokens, V)
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=m.scale)
    return out.view(batch, H, tokens, V).transpose(1, 2).reshape(batch, tokens, -1)


def two_einsums(
    m: Attention, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Scores [B, S, H, T] as the sum of two products, each with the mask in other axes."""
    q_nope, q_rope, latent, rope_key = m.parts(x, cos, sin)
    k_nope, value = m.expanded(latent)
    scores = torch.einsum("bshn,bthn->bsht", q_nope, k_nope)
    scores = scores + torch.einsum("bshr,btr->bsht", q_rope, rope_key)
    hidden = torch.arange(x.shape[1])[:, None] < torch.arange(x.shape[1])
    scores = (scores * m.scale).masked_fill(hidden[:, None], -1e30)
    return torch.einsum("bsht,bthv->bshv", scores.softmax(-1), value).flatten(2)


def absorbed(m: Attention, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Attention on the latent itself, as DeepSeek's own inference code has it."""
    q_nope, q_rope, latent, rope_key = m.parts(x, cos, sin)
    w = m.w_kv_b.weight.view(H, N + V, L)
    q_latent = torch.einsum("bshn,hnl->bshl", q_nope, w[:, :N])
    scores = torch.einsum("bshl,btl->bsht", q_latent, latent)
    scores = (scores + torch.einsum("bshr,btr->bsht", q_rope, rope_key)) * m.scale
    scores = scores + causal(x.shape[1]).unsqueeze(1)
    out = torch.einsum("bsht,btl->bshl", scores.softmax(-1), latent)
    return torch.einsum("bshl,hvl->bshv", out, w[:, N:]).flatten(2)


def batched(m: Attention, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """bmm over rows and heads in one axis, position part first, scale on the query."""
    q_nope, q_rope, latent, rope_key = m.parts(x, cos, sin)
    k_nope, value = m.expanded(latent)
    batch, tokens = x.shape[:2]
    q = torch.cat((q_rope, q_nope), dim=-1).transpose(1, 2).flatten(0, 1) / math.sqrt(N + R)
    k = torch.cat((rope_key[:, :, None].repeat(1, 1, H, 1), k_nope), dim=-1)
    k = k.permute(0, 2, 3, 1).flatten(0, 1)
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    scores = torch.where(visible, torch.bmm(q, k), torch.finfo(torch.float32).min)
    out = torch.bmm(torch.softmax(scores, dim=-1), value.transpose(1, 2).flatten(0, 1))
    return out.view(batch, H, tokens, V).permute(0, 2, 1, 3).reshape(batch, tokens, H * V)


def by_seam(m: Attention, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The documented function."""
    from mla_deploy.source import latent_attention

    q_nope, q_rope, latent, rope_key = m.parts(x, cos, sin)
    query = torch.cat((q_nope, q_rope), dim=-1).transpose(1, 2)
    out = latent_attention(query, latent, rope_key, m.w_kv_b.weight, scale=m.scale)
    return out.transpose(1, 2).flatten(2)


FORMS: dict[str, Callable[..., torch.Tensor]] = {
    form.__name__: form
    for form in (textbook, fused, fused_mask, two_einsums, absorbed, batched, by_seam)
}


def computed(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Angles made on the way."""
    angles = torch.arange(tokens)[:, None] * 100.0 ** (-torch.arange(0, R, 2) / R)
    return angles.cos(), angles.sin()


class Lm(nn.Module):
    """Two layers; `rope` is computed, stored (a buffer that is sliced) or given (positions)."""

    def __init__(self, form: str = "textbook", rope: str = "computed") -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, D)
        self.layers = nn.ModuleList(Attention(form) for _ in range(2))
        self.norms = nn.ModuleList(nn.RMSNorm(D, eps=1e-6) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D)) for _ in range(2)
        )
        self.head = nn.Linear(D, VOCAB, bias=False)
        self.rope = rope
        if rope == "stored":
            cos, sin = computed(LONGEST)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        count = tokens.shape[1]
        stored = self.rope == "stored"
        cos, sin = (self.cos[:count], self.sin[:count]) if stored else computed(count)
        x = self.embedding(tokens)
        for layer, norm, mlp in zip(self.layers, self.norms, self.mlps, strict=True):
            x = x + layer(norm(x), cos, sin)
            x = x + mlp(x)
        return self.head(x)


def tied() -> nn.Module:
    """Head and embedding are one weight; stored angles."""
    model = seeded("fused", "stored")
    model.head.weight = model.embedding.weight
    return model


def seeded(form: str, rope: str = "computed") -> Lm:
    """The same weights for every form."""
    torch.manual_seed(7)
    model = Lm(form, rope)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3) if weight.dim() > 1 else nn.init.normal_(weight, 1, 0.1)
    return model


def lm() -> nn.Module:
    """A factory, as `--module` wants it."""
    return seeded("textbook")


class Complex(Lm):
    """DeepSeek's own way: complex rotation, positions that start at an offset, mask from size."""

    def __init__(self) -> None:
        super().__init__("textbook")
        angles = torch.outer(torch.arange(LONGEST), 100.0 ** (-torch.arange(0, R, 2) / R))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles), False)

    def forward(self, tokens: torch.Tensor, start: int = 0) -> torch.Tensor:
        turns = self.turns[start : start + tokens.shape[1]]
        x = self.embedding(tokens)
        mask = causal(tokens.shape[1]) if tokens.shape[1] > 1 else None
        for layer, norm, mlp in zip(self.layers, self.norms, self.mlps, strict=True):
            x = x + layer.w_o(self.attend(layer, norm(x), turns, mask))
            x = x + mlp(x)
        return self.head(x)

    def attend(
        self, m: Attention, x: torch.Tensor, turns: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        q = m.w_q(x).view(*x.shape[:2], H, N + R)
        q_nope, q_rope = q.split((N, R), dim=-1)
        latent, rope_key = m.w_kv_a(x).split((L, R), dim=-1)
        q = torch.cat((q_nope, turned(q_rope, turns)), dim=-1)
        rope_key = turned(rope_key.unsqueeze(2), turns)
        kv = m.w_kv_b(m.norm(latent)).view(*x.shape[:2], H, N + V)
        k_nope, value = kv.split((N, V), dim=-1)
        k = torch.cat((k_nope, rope_key.expand(-1, -1, H, -1)), dim=-1)
        scores = torch.einsum("bshd,bthd->bsht", q, k) * m.scale
        if mask is not None:
            scores += mask.unsqueeze(1)
        weights = scores.softmax(dim=-1, dtype=torch.float32).type_as(x)
        return torch.einsum("bsht,bthd->bshd", weights, value).flatten(2)


def turned(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Neighbours as real and imaginary part."""
    z = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    z = z * turns.view(1, z.size(1), 1, z.size(-1))
    return torch.view_as_real(z).flatten(3).type_as(x)


class Given(Lm):
    """Positions are an argument; the result is a dict; learned positions are added on top."""

    def __init__(self) -> None:
        super().__init__("fused")
        self.places = nn.Embedding(LONGEST, D)

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        angles = position_ids[..., None] * 100.0 ** (-torch.arange(0, R, 2) / R)
        x = self.embedding(input_ids) + self.places(position_ids)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            q_nope, q_rope, latent, rope_key = layer.parts(norm(x), angles.cos(), angles.sin())
            x = x + layer.w_o(_attend(layer, q_nope, q_rope, latent, rope_key))
        return {"logits": self.head(x)}


class Learned(Given):
    """Learned positions by arange, no rotation on top of them."""

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, None]:
        x = self.embedding(input_ids) + self.places(torch.arange(input_ids.size(1)))
        flat = torch.zeros(input_ids.shape[1], R // 2)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            parts = layer.parts(norm(x), flat + 1, flat)
            x = x + layer.w_o(_attend(layer, *parts))
        return self.head(x), None


def _attend(
    m: Attention,
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    rope_key: torch.Tensor,
) -> torch.Tensor:
    k_nope, value = m.expanded(latent)
    q = torch.cat((q_nope, q_rope), dim=-1).transpose(1, 2)
    k = torch.cat((k_nope, rope_key[:, :, None].expand(-1, -1, H, -1)), dim=-1).transpose(1, 2)
    out = functional.scaled_dot_product_attention(q, k, value.transpose(1, 2), is_causal=True)
    return out.transpose(1, 2).flatten(2)


class Official(nn.Module):
    """Low-rank queries, three-dimensional weights, its own norm, no rope part shared by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D)
        self.w_dq, self.w_uq = nn.Linear(D, 12), nn.Linear(12, H * (N + R), bias=False)
        self.w_dkv = nn.Parameter(torch.empty(D, L))
        self.w_kr = nn.Parameter(torch.empty(R, D))
        self.w_uk, self.w_uv = (
            nn.Parameter(torch.empty(H, L, N)),
            nn.Parameter(torch.empty(H, L, V)),
        )
        self.w_o = nn.Parameter(torch.empty(H, V, D))
        self.gain = nn.Parameter(torch.ones(L))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        positions = torch.arange(ids.shape[-1])
        frequencies = torch.repeat_interleave(100.0 ** (-torch.arange(0, R, 2) / R), 2)
        angles = positions.unsqueeze(-1) * frequencies
        q = self.w_uq(self.w_dq(x)).unflatten(-1, (H, N + R))
        q_nope, q_rope = q[..., :N], q[..., N:]
        q_rope = q_rope * angles.cos()[:, None] + swapped(q_rope) * angles.sin()[:, None]
        c = x @ self.w_dkv
        c = c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain
        k_rope = x @ self.w_kr.T
        k_rope = k_rope * angles.cos() + swapped(k_rope) * angles.sin()
        k_nope = torch.einsum("btl,hln->bthn", c, self.w_uk)
        v = torch.einsum("btl,hlv->bhtv", c, self.w_uv)
        scores = torch.einsum("bshn,bthn->bhst", q_nope, k_nope)
        scores = scores + torch.einsum("bshr,btr->bhst", q_rope, k_rope)
        mask = torch.tril(torch.ones(ids.shape[1], ids.shape[1])) == 0
        scores = (scores / (N + R) ** 0.5).masked_fill(mask, torch.finfo(scores.dtype).min)
        out = torch.matmul(scores.softmax(-1), v)
        return torch.einsum("bhsv,hvd->bsd", out, self.w_o) @ self.embed.weight.T


def swapped(x: torch.Tensor) -> torch.Tensor:
    """(a, b) -> (-b, a) for neighbours."""
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def filled(model: nn.Module) -> nn.Module:
    """Fixed random weights."""
    torch.manual_seed(3)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3) if weight.dim() > 1 else nn.init.normal_(weight, 1, 0.1)
    return model


def complex_turns() -> nn.Module:
    return filled(Complex())


def given_positions() -> nn.Module:
    return filled(Given())


def learned_positions() -> nn.Module:
    return filled(Learned())


def official() -> nn.Module:
    return filled(Official())
