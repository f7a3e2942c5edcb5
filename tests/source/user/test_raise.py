"""Latent attention found in plain PyTorch, however written; the rest is refused by name."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from mla_deploy.errors import InputError
from mla_deploy.source import latent_attention
from mla_deploy.source.user.factory import UserModule
from mla_deploy.source.user.raised import RaisedModule, raise_module, whole_logits


def _models() -> ModuleType:
    """`models.py` of this folder, by its path: the tests are no package."""
    name = "user_models"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("models.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


models = _models()
IDS = torch.tensor([[3, 9, 4, 4, 17, 0, 21], [5, 5, 1, 30, 2, 8, 39]])


def user(module: nn.Module) -> UserModule:
    return UserModule("tests:model", module.float().eval().requires_grad_(False), (), "")


def raised(module: nn.Module) -> RaisedModule:
    return raise_module(user(module))


def in_calls(found: RaisedModule, ids_BS: torch.Tensor, *counts: int) -> torch.Tensor:
    """Logits of the raised model, the tokens given in calls of so many."""
    attend, parts, start = found.eager({}), [], 0
    for count in counts:
        positions = torch.arange(start, start + count).expand(ids_BS.shape[0], -1)
        parts.append(found.logits(ids_BS[:, start : start + count], positions, attend))
        start += count
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("rope", ["computed", "stored"])
@pytest.mark.parametrize("form", sorted(models.FORMS))
def test_every_form_is_the_same_model(form: str, rope: str) -> None:
    """The textbook form, run in PyTorch on whole rows, is the reference of all."""
    wanted = whole_logits(user(models.seeded("textbook", rope)), IDS)
    found = raised(models.seeded(form, rope))
    torch.testing.assert_close(in_calls(found, IDS, 4, 1, 2), wanted, rtol=1e-4, atol=1e-5)
    assert [(len(each.latent), each.rope, each.heads) for each in found.latents] == [
        (models.L, models.R, models.H)
    ] * 2
    assert found.graph.most_tokens == (models.LONGEST if rope == "stored" else None)


@pytest.mark.parametrize(
    "factory", ["complex_turns", "given_positions", "learned_positions", "official", "tied"]
)
def test_other_ways_to_write_it(factory: str) -> None:
    module = getattr(models, factory)()
    wanted = whole_logits(user(module), IDS)
    found = raised(module)
    torch.testing.assert_close(in_calls(found, IDS, 5, 1, 1), wanted, rtol=1e-4, atol=1e-5)
    assert found.latents[0].w_kv_b.shape == (models.H * (models.N + models.V), models.L)


def test_expansion_is_read_exactly() -> None:
    """By unit vectors: the very weights, in the layout of kv_b_proj."""
    module = models.seeded("batched")
    for layer, found in zip(module.layers, raised(module).latents, strict=True):
        assert torch.equal(found.w_kv_b, layer.w_kv_b.weight)


def test_seam_is_causal_attention_and_trains() -> None:
    torch.manual_seed(0)
    sizes = ((2, 3, 5, 12), (2, 5, 10), (2, 5, 4), (3 * 14, 10))
    q, c, k, w = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes)
    out = latent_attention(q, c, k, w, scale=0.3)
    w_HKL = w.view(3, 14, 10)
    for new in range(5):  # row by row and head by head, from the formula
        for head in range(3):
            keys = c[0, : new + 1] @ w_HKL[head, :8].T
            scores = keys @ q[0, head, new, :8] + k[0, : new + 1] @ q[0, head, new, 8:]
            wanted = (scores * 0.3).softmax(0) @ (c[0, : new + 1] @ w_HKL[head, 8:].T)
            torch.testing.assert_close(out[0, head, new], wanted)
    assert torch.autograd.gradcheck(
        lambda *given: latent_attention(*given, scale=0.3), (q, c, k, w)
    )
    with pytest.raises(ValueError, match="42 rows for 4 heads"):
        latent_attention(torch.zeros(2, 4, 5, 12), c, k, w, scale=0.3)


class Changed(models.Lm):  # type: ignore[name-defined]
    """A model that `wrong` puts something into: the scores, the mask, the expansion."""

    def __init__(self, wrong: str) -> None:
        super().__init__("textbook")
        self.wrong = wrong

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        if self.wrong == "sum over tokens":
            x = x + x.cumsum(1)
        cos, sin = models.computed(tokens.shape[1])
        if self.wrong == "switch":
            cos = torch.where(torch.arange(tokens.shape[1]).max() >= 600, cos * 0.5, cos)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer.w_o(self.attend(layer, norm(x), cos, sin))
        return self.head(x)

    def attend(
        self, m: nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        q_nope, q_rope, latent, rope_key = m.parts(x, cos, sin)
        k_nope, value = m.expanded(latent)
        if self.wrong == "bias":
            value, k_nope = value + 0.5, k_nope - torch.arange(models.N)
        scores = torch.einsum("bshn,bthn->bhst", q_nope, k_nope)
        scores = (scores + torch.einsum("bshr,btr->bhst", q_rope, rope_key)) * m.scale
        if self.wrong == "cap":
            scores = 5 * torch.tanh(scores / 5)
        mask = models.causal(x.shape[1])
        if self.wrong == "window":
            mask = mask + torch.full_like(mask, float("-inf")).tril(-4)
        if self.wrong == "far window":
            mask = mask + torch.full_like(mask, float("-inf")).tril(-300)
        if self.wrong == "wide window":
            mask = mask + torch.full_like(mask, float("-inf")).tril(-20000)
        if self.wrong == "both ways":
            mask = torch.zeros_like(mask)
        if self.wrong == "bias by distance":
            mask = mask - torch.arange(x.shape[1]) * 0.1
        weights = (scores + mask).softmax(-1)
        return torch.einsum("bhst,bthv->bshv", weights, value).flatten(2)


@pytest.mark.parametrize(
    ("wrong", "code", "told"),
    [
        ("cap", "SRC-RAISE", "aten.tanh.default"),
        ("window", "SRC-RAISE", "token 4 does not see token 0"),
        ("far window", "SRC-RAISE", "token 300 does not see token 0"),
        ("wide window", "SRC-RAISE", "may change at 20000 tokens"),
        ("switch", "SRC-RAISE", "changes with the number of tokens"),
        ("both ways", "SRC-RAISE", "token 0 sees token 1"),
        ("bias by distance", "SRC-RAISE", "wanted 0 or -inf"),
        ("sum over tokens", "SRC-RAISE", "relative error"),
    ],
)
def test_what_is_not_known_is_refused_by_name(wrong: str, code: str, told: str) -> None:
    with pytest.raises(InputError, match=told) as refusal:
        raised(models.filled(Changed(wrong)))
    assert refusal.value.code == code


def test_biases_of_the_expansion_are_folded() -> None:
    """The keys' drops out of the softmax, the values' goes to the result."""
    module = models.filled(Changed("bias"))
    found = raised(module)
    wanted = whole_logits(user(module), IDS)
    torch.testing.assert_close(in_calls(found, IDS, 3, 4), wanted, rtol=1e-4, atol=1e-5)
    assert len(found.latents[0].latent) == models.L
    assert found.latents[0].value_bias_HV is not None
    assert torch.all(found.latents[0].value_bias_HV == 0.5)


class Heads(nn.Module):
    """Keys and values of every head's own, turned by position: nothing narrow in front of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 24)
        self.w_q, self.w_k, self.w_v = (nn.Linear(24, 24, bias=False) for _ in range(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        angles = torch.arange(ids.shape[1])[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])
        q, k, v = (
            w(x).unflatten(-1, (3, 8)).transpose(1, 2) for w in (self.w_q, self.w_k, self.w_v)
        )
        q, k = (models.rotate_half(each, angles.cos(), angles.sin()) for each in (q, k))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).flatten(2) @ self.embedding.weight.T


class Quiet(nn.Module):
    """No attention at all."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 24)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(ids) @ self.embedding.weight.T


@pytest.mark.parametrize(
    ("module", "told"), [(Heads(), "there is no latent"), (Quiet(), "has no attention")]
)
def test_no_latent(module: nn.Module, told: str) -> None:
    with pytest.raises(InputError, match=told) as refusal:
        raised(module)
    assert refusal.value.code == "SRC-NO-LATENT"


class Cached(nn.Module):
    """Keeps tokens in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1, dtype=torch.int64))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return ids[..., None].float()


class Fixed(nn.Module):
    """Takes seven tokens only."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return ids.float().view(3, 7, 1)


class Needs(nn.Module):
    """Needs a mask."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return ids[..., None].float()


class Hidden(nn.Module):
    """Gives one vector a row."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return ids.float()


@pytest.mark.parametrize(
    ("module", "told"),
    [
        (Cached(), "changes its buffers"),
        (Fixed(), "tokens only"),
        (Needs(), "needs 'mask'"),
        (Hidden(), "wanted logits"),
    ],
)
def test_no_language_model(module: nn.Module, told: str) -> None:
    with pytest.raises(InputError, match=told) as refusal:
        raised(module)
    assert refusal.value.code == "SRC-MODULE"
