"""Which matrices read which channels: found whole, and left alone where they are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mla_deploy.checkpoint import open_checkpoint
from mla_deploy.source.channel_groups import HEADS, NORM, PRODUCT, ChannelGroup, channel_groups
from mla_deploy.source.layerwise import LayerwiseModel
from mla_deploy.source.model import source_weights
from mla_deploy.weight_forms.channel_scales import ChannelScales, of_heads
from tests.exported import exported

IDS = torch.tensor([[3, 17, 40, 5, 61, 22, 8, 90], [9, 8, 7, 6, 70, 33, 41, 2]])


def with_model(preset: str, asked: Callable[[LayerwiseModel], Any]) -> Any:
    with open_checkpoint(exported(preset).checkpoint) as checkpoint:
        weights = source_weights(checkpoint)
        return asked(LayerwiseModel(checkpoint.config, weights.read_parameter))


def groups_of(preset: str) -> dict[str, ChannelGroup]:
    found = with_model(preset, lambda model: channel_groups(model, IDS))
    return {group.maker.removeprefix("model."): group for group in found}


def readers(group: ChannelGroup) -> list[str]:
    return [name.rpartition("layers.")[2] for name in group.readers]


def test_every_reader_of_a_norm_is_known() -> None:
    """Router, shared experts and the stack of experts among them."""
    found = groups_of("v3")
    assert readers(found["layers.1.input_layernorm.weight"]) == [
        "1.self_attn.q_a_proj.weight",
        "1.self_attn.kv_a_proj_with_mqa.weight",
    ]
    assert readers(found["layers.1.self_attn.q_a_layernorm.weight"]) == [
        "1.self_attn.q_b_proj.weight"
    ]
    experts = found["layers.1.post_attention_layernorm.weight"]
    assert (experts.kind, experts.width, experts.neutral) == (NORM, 48, 1.0)
    assert set(readers(experts)) == {
        "1.mlp.gate.weight",
        "1.mlp.experts.gate_up_proj",
        "1.mlp.shared_experts.gate_proj.weight",
        "1.mlp.shared_experts.up_proj.weight",
    }
    assert found["layers.0.mlp.up_proj.weight"].kind == PRODUCT
    assert readers(found["layers.0.mlp.up_proj.weight"]) == ["0.mlp.down_proj.weight"]
    values = found["layers.1.self_attn.kv_b_proj.weight"]
    assert (values.kind, values.heads, values.nope, values.width) == (HEADS, 4, 8, 4 * 8)
    assert readers(values) == ["1.self_attn.o_proj.weight"]


def test_what_is_looked_up_in_is_left_alone() -> None:
    assert "norm.weight" in groups_of("v3")
    assert "norm.weight" not in groups_of("v3-tied-eps")


@pytest.mark.parametrize("reads", ["add", "softmax"])
def test_a_value_that_something_else_reads_is_left_alone(reads: str) -> None:
    """One layer's gate is read twice: by its product, and by what no scale passes through."""

    def spoiled(model: LayerwiseModel) -> tuple[ChannelGroup, ...]:
        mlp: Any = model.module.get_submodule("model.layers.0.mlp")
        plain = mlp.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            more = x + 1.0 if reads == "add" else x.softmax(-1)
            found: torch.Tensor = plain(x) + more
            return found

        mlp.forward = forward
        return channel_groups(model, IDS)

    makers = {group.maker for group in with_model("v3", spoiled)}
    assert "model.layers.0.post_attention_layernorm.weight" not in makers
    assert "model.layers.0.input_layernorm.weight" in makers


@pytest.mark.parametrize(
    "preset", ["v3", "v2-lite", "v3-wide-value", "youtu-bias-five-heads", "minicpm3", "glm4-lite"]
)
def test_scales_of_every_group_change_nothing(preset: str) -> None:
    """Any scale will do; one that a reader lacks moves the logits."""

    def compared(model: LayerwiseModel) -> tuple[float, float, int]:
        groups = channel_groups(model, IDS)
        generator = torch.Generator().manual_seed(5)
        scales = {}
        for group in groups:
            scale_K = torch.rand(group.width, generator=generator) * 3 + 0.2
            if group.kind == HEADS:
                scale_K = of_heads(scale_K, group.heads, group.nope)
            scales[group.maker] = scale_K
        readers = {reader: group.maker for group in groups for reader in group.readers}
        whole = ChannelScales(scales, readers)
        lacking = ChannelScales(scales, dict(list(readers.items())[1:]))
        wanted = model.logits(IDS, lambda _, weight: weight)
        distances = [
            float((model.logits(IDS, prepared) - wanted).norm() / wanted.norm())
            for prepared in (whole, lacking)
        ]
        return distances[0], distances[1], len(groups)

    whole, lacking, groups = with_model(preset, compared)
    assert groups >= 10
    assert whole < 1e-5
    assert lacking > 1e-3
