"""Which layers are alike: one trace serves all of a kind, and two kinds never share one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from mla_deploy.errors import InputError
from mla_deploy.source.cache_parts import CachePart
from mla_deploy.source.layers import decoder_of, layer_kinds, layers_prefix
from mla_deploy.source.probe import LayerCall
from tests.tiny import tiny_model


def groups(model: Any) -> list[tuple[int, ...]]:
    return [kind.indices for kind in layer_kinds(model, calls(model))]


def calls(model: Any) -> list[LayerCall]:
    """Calls that are all alike, so that only the modules tell the layers apart."""
    spec = pytree.tree_flatten(())[1]
    part = CachePart(0, "latent", (16,))
    one = LayerCall((), (), spec, None, (), (), (), spec, (part,), ())
    return [one] * len(model.model.layers)


def test_another_call_makes_a_kind() -> None:
    model = tiny_model("deepseek_v3", first_k_dense_replace=0, num_hidden_layers=3)
    made = calls(model)
    sliding = replace(made[0], parts=(CachePart(2, "latent", (16,), window=4),))
    shifted = replace(made[0], parts=(CachePart(1, "latent", (16,)),))
    assert [k.indices for k in layer_kinds(model, [made[0], shifted, sliding])] == [(0, 1), (2,)]


@pytest.mark.parametrize(
    ("dense", "layers", "wanted"),
    [
        (0, 3, [(0, 1, 2)]),
        (1, 3, [(0,), (1, 2)]),
        (2, 3, [(0, 1), (2,)]),
        (3, 3, [(0, 1, 2)]),
        (1, 1, [(0,)]),
    ],
)
def test_dense_and_sparse(dense: int, layers: int, wanted: list[tuple[int, ...]]) -> None:
    model = tiny_model("deepseek_v3", first_k_dense_replace=dense, num_hidden_layers=layers)
    assert groups(model) == wanted


def test_names_are_distinct_and_in_model_order() -> None:
    model = tiny_model("deepseek_v3")
    kinds = layer_kinds(model, calls(model))
    assert [kind.name for kind in kinds] == ["DecoderLayer0", "DecoderLayer1"]


def other_scale(layer: Any) -> None:
    layer.self_attn.scaling *= 2


def other_epsilon(layer: Any) -> None:
    layer.input_layernorm.variance_epsilon = 0.1


def other_class(layer: Any) -> None:
    layer.mlp.act_fn = nn.ReLU()


def other_shape(layer: Any) -> None:
    old = layer.mlp.up_proj.weight
    layer.mlp.up_proj.weight = nn.Parameter(torch.zeros(old.shape[0] + 1, old.shape[1]))


def a_bias(layer: Any) -> None:
    layer.self_attn.o_proj.bias = nn.Parameter(torch.zeros(48))


def a_buffer(layer: Any) -> None:
    layer.register_buffer("offset", torch.zeros(3))


def a_scalar_more(layer: Any) -> None:
    layer.self_attn.sliding_window = 16


@pytest.mark.parametrize(
    "change",
    [other_scale, other_epsilon, other_class, other_shape, a_bias, a_buffer, a_scalar_more],
)
def test_any_difference_makes_a_kind(change: Any) -> None:
    model = tiny_model("youtu", num_hidden_layers=3)
    assert groups(model) == [(0, 1, 2)]
    change(model.model.layers[1])
    assert groups(model) == [(0, 2), (1,)]


def test_weights_make_no_kind() -> None:
    model = tiny_model("youtu", num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.zero_()
    assert groups(model) == [(0, 1, 2)]


def test_the_layer_list_s_place() -> None:
    model = tiny_model("youtu")
    assert layers_prefix(model) == "model.layers"
    assert decoder_of(model) is model.model


@pytest.mark.parametrize("part", ["layers", "norm", "embed_tokens"])
def test_a_model_laid_out_otherwise_is_refused(part: str) -> None:
    model = tiny_model("youtu")
    delattr(model.model, part)
    with pytest.raises(InputError, match=part) as caught:
        decoder_of(model)
    assert caught.value.code == "SRC-LAYOUT"
