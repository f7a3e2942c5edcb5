"""The seams: what is unknown is refused by name, and the hooks leave no trace of themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mla_deploy.errors import InputError
from mla_deploy.source.cache_parts import CachePart, buffers_of
from mla_deploy.source.plan import step_plan
from mla_deploy.source.seams import hooked
from mla_deploy.source.traced_cache import TracedCache
from tests.tiny import tiny_model

Q = torch.zeros(1, 4, 2, 16)
K, V = torch.zeros(1, 4, 3, 16), torch.zeros(1, 4, 3, 8)
MASK = torch.ones(1, 1, 2, 3, dtype=torch.bool)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("deepseek_v3")


@pytest.fixture
def hooks(model: Any) -> Iterator[None]:
    with hooked(model):
        yield


def attention(model: Any, *operands: Any, **arguments: Any) -> Any:
    """As a layer calls it: through the registry, under the name its config holds."""
    module = model.model.layers[0].self_attn
    name = module.config._attn_implementation
    return AttentionInterface()[name](module, *(operands or (Q, K, V, MASK)), **arguments)


@pytest.mark.usefixtures("hooks")
def test_plain_attention_is_taken(model: Any) -> None:
    out, weights = attention(model, scaling=0.3, dropout=0.0, is_causal=True, sliding_window=None)
    assert out.shape == (1, 2, 4, 8)
    assert weights is None


@pytest.mark.usefixtures("hooks")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("softcap", 30.0),
        ("head_mask", torch.ones(4)),
        ("a_part_of_tomorrow", False),
    ],
)
def test_an_unknown_attention_argument_is_refused(model: Any, name: str, value: Any) -> None:
    with pytest.raises(InputError, match=name) as caught:
        attention(model, scaling=0.3, **{name: value})
    assert caught.value.code == "SRC-SEAM"


@pytest.mark.usefixtures("hooks")
def test_attention_without_scale_or_mask_is_refused(model: Any) -> None:
    with pytest.raises(InputError, match="SRC-SEAM"):
        attention(model)
    with pytest.raises(InputError, match="SRC-SEAM"):
        attention(model, Q, K, V, None, scaling=0.3)


def experts(module: Any) -> Any:
    name = module.config._experts_implementation
    hidden, index = torch.zeros(2, 48), torch.zeros(2, 3, dtype=torch.int64)
    return ALL_EXPERTS_FUNCTIONS[name](module, hidden, index, torch.zeros(2, 3))


@pytest.mark.usefixtures("hooks")
def test_plain_experts_are_taken(model: Any) -> None:
    assert experts(model.model.layers[1].mlp.experts).shape == (2, 48)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("has_bias", True),
        ("has_gate", False),
        ("is_concatenated", False),
        ("is_transposed", True),
        ("has_post_expert_norm", True),
        ("act_fn", nn.Tanh()),
        ("act_fn", ACT2FN["relu2"]),
        ("act_fn", ACT2FN["gelu_new"]),
    ],
)
def test_other_experts_are_refused(name: str, value: Any) -> None:
    model = tiny_model("deepseek_v3")
    module = model.model.layers[1].mlp.experts
    setattr(module, name, value)
    with hooked(model), pytest.raises(InputError, match="gate/up/down") as caught:
        experts(module)
    assert caught.value.code == "SRC-SEAM"


def clamped(self: Any, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    limit = self.swiglu_limit
    return nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def shifted(self: Any, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return nn.functional.silu(gate.clamp(max=self.swiglu_limit)) * (up + 1)


@pytest.mark.parametrize(("gate", "known"), [(clamped, True), (shifted, False)])
def test_a_gate_of_a_class_s_own_is_tried(
    monkeypatch: pytest.MonkeyPatch, gate: Any, known: bool
) -> None:
    """A clamp is taken over; another gate (as GPT-OSS has) would be lost without a word."""
    model = tiny_model("deepseek_v3")
    module = model.model.layers[1].mlp.experts
    module.swiglu_limit = 2.0
    monkeypatch.setattr(type(module), "_apply_gate", gate)
    with hooked(model):
        if known:
            assert experts(module).shape == (2, 48)
        else:
            with pytest.raises(InputError, match="SRC-SEAM"):
                experts(module)


@pytest.mark.usefixtures("hooks")
def test_a_bias_of_the_latent_expansion_is_refused(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = model.model.layers[0].self_attn
    latent, rope_key = torch.zeros(1, 1, 3, 16), torch.zeros(1, 1, 3, 8)
    key, value = module.expand_kv(latent, rope_key)
    assert (key.shape, value.shape) == ((1, 4, 3, 16), (1, 4, 3, 8))
    monkeypatch.setattr(module.kv_b_proj, "bias", nn.Parameter(torch.zeros(64)))
    with pytest.raises(InputError, match="kv_b_proj has a bias") as caught:
        module.expand_kv(latent, rope_key)
    assert caught.value.code == "SRC-SEAM"


@pytest.mark.parametrize("widths", [(24,), (16, 8)])
def test_a_layer_updates_its_cache_once(widths: tuple[int, ...]) -> None:
    steps = step_plan(torch.arange(1), torch.tensor([2]), torch.tensor([1]), 4)
    parts = (CachePart(0, "latent", (16,)), CachePart(0, "rope_key", (8,)))
    buffers = buffers_of(parts, fused=len(widths) == 1)
    assert [buffer.shape for buffer in buffers] == [(width,) for width in widths]
    held = [(buffer, torch.zeros(1, 1, 4, *buffer.shape)) for buffer in buffers]
    cache = TracedCache(steps, None, held)
    with pytest.raises(InputError, match="SRC-CACHE"):
        _ = cache.updated
    rows = cache.update(torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 1, 8), 0)
    assert [tuple(part.shape) for part in rows] == [(1, 1, 4, 16), (1, 1, 4, 8)]
    assert len(cache.updated) == len(widths)
    with pytest.raises(InputError, match="SRC-CACHE"):
        cache.update(torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 1, 8), 0)


def snapshot(model: Any) -> dict[str, Any]:
    """Every attribute of every class and module file behind the model, and its implementations."""
    classes = {base for m in model.modules() for base in type(m).__mro__}
    files = {inspect.getmodule(owner) for owner in classes}
    found = {f"{owner}.{k}": v for owner in (*classes, *files) for k, v in vars(owner).items()}
    for name, module in model.named_modules():
        found[f"{name}:attributes"] = sorted(vars(module))
        config = getattr(module, "config", None)
        if config is not None:
            found[f"{name}:attention"] = config._attn_implementation
            found[f"{name}:experts"] = config._experts_implementation
    return found


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "minicpm3"])
def test_hooks_are_undone(family: str) -> None:
    model = tiny_model(family)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        wanted = model(ids).logits
    before = snapshot(model)
    with hooked(model):
        assert snapshot(model) != before
    assert snapshot(model) == before
    with torch.no_grad():
        assert torch.equal(model(ids).logits, wanted)


def test_hooks_are_undone_after_an_error() -> None:
    model = tiny_model("deepseek_v2")
    before = snapshot(model)
    with pytest.raises(KeyError), hooked(model):
        raise KeyError
    assert snapshot(model) == before


def test_an_inherited_expansion_stays_inherited() -> None:
    """A subclass without an `expand_kv` of its own must not be left with a copy of its base's."""
    model = tiny_model("deepseek_v3")
    attention = model.model.layers[0].self_attn
    attention.__class__ = type("OwnAttention", (type(attention),), {})
    with hooked(model):
        assert "expand_kv" in vars(type(attention))
    assert "expand_kv" not in vars(type(attention))
