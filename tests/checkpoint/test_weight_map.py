"""The weight map against transformers' own classes: names, shapes, values, styles, leftovers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mla_deploy.checkpoint import WeightMap, map_weights, open_checkpoint
from mla_deploy.errors import InputError
from tests.checkpoint.edits import edit_config, edit_weights, module_facts
from tests.tiny import TINY_PRESETS, write_preset, write_tiny

Tensors = dict[str, Any]
EXPERTS = "model.layers.1.mlp.experts"


def mapped(folder: Path) -> WeightMap:
    checkpoint = open_checkpoint(folder)
    return map_weights(checkpoint, *module_facts(checkpoint.config.raw))


def refused(folder: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        mapped(folder)
    assert caught.value.exit_status == 4
    return caught.value


@pytest.mark.parametrize("name", TINY_PRESETS)
def test_every_parameter_as_transformers_loads_it(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    write_preset(tmp_path, name)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    weights = mapped(tmp_path)
    assert weights.tied == model.all_tied_weights_keys
    assert not weights.skipped
    for parameter, value in model.state_dict().items():
        found = weights.read_parameter(parameter)
        assert found.dtype == value.dtype
        assert torch.equal(found, value), parameter


def test_experts_are_virtual_names_of_one_matrix(tmp_path: Path) -> None:
    weights = mapped(write_tiny(tmp_path))
    gate_up = weights.read_parameter(f"{EXPERTS}.gate_up_proj")
    down = weights.read_parameter(f"{EXPERTS}.down_proj")
    assert gate_up.shape == (8, 40, 48) and down.shape == (8, 48, 20)
    for expert in range(8):
        assert torch.equal(
            weights.read(f"{EXPERTS}.{expert}.gate_proj.weight"), gate_up[expert, :20]
        )
        assert torch.equal(weights.read(f"{EXPERTS}.{expert}.up_proj.weight"), gate_up[expert, 20:])
        assert torch.equal(weights.read(f"{EXPERTS}.{expert}.down_proj.weight"), down[expert])
    assert f"{EXPERTS}.gate_up_proj" not in weights.slices
    with pytest.raises(InputError):
        weights.read(f"{EXPERTS}.gate_up_proj")


def to_w123(tensors: Tensors) -> None:
    for ours, theirs in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        for expert in range(8):
            name = f"{EXPERTS}.{expert}.{ours}.weight"
            tensors[f"{EXPERTS}.{expert}.{theirs}.weight"] = tensors.pop(name)


def to_fused(ending: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        def taken(part: str) -> torch.Tensor:
            return torch.stack([tensors.pop(f"{EXPERTS}.{e}.{part}.weight") for e in range(8)])

        both = [taken("gate_proj"), taken("up_proj")]
        tensors[f"{EXPERTS}.gate_up_proj{ending}"] = torch.cat(both, dim=1)
        tensors[f"{EXPERTS}.down_proj{ending}"] = taken("down_proj")

    return change


STYLES = {"w1-w3-w2": to_w123, "fused": to_fused(""), "fused.weight": to_fused(".weight")}


@pytest.mark.parametrize("style", STYLES)
def test_every_expert_style_gives_the_same_weights(tmp_path: Path, style: str) -> None:
    plain = mapped(write_tiny(tmp_path / "plain"))
    other = mapped(edit_weights(write_tiny(tmp_path / "other"), STYLES[style]))
    assert set(other.slices) == set(plain.slices)
    for name, wanted in plain.slices.items():
        assert other.slices[name].shape == wanted.shape
        assert torch.equal(other.read(name), plain.read(name))
    for parameter in plain.parameters:
        assert torch.equal(other.read_parameter(parameter), plain.read_parameter(parameter))


def prediction_layer(layer: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        prefix = f"model.layers.{layer}"
        for part in ("eh_proj", "enorm", "hnorm", "shared_head.norm", "self_attn.o_proj"):
            tensors[f"{prefix}.{part}.weight"] = torch.zeros(4, 4)

    return change


def test_multi_token_prediction_layers_are_counted(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    edit_weights(tmp_path, prediction_layer(2))
    edit_weights(tmp_path, prediction_layer(3))
    assert mapped(tmp_path).skipped == {"model.layers.2.*": 5, "model.layers.3.*": 5}


def test_rotary_tables_are_counted(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in (0, 1)]
    names.append("model.rotary_emb.inv_freq")
    edit_weights(tmp_path, lambda t: t.update({name: torch.ones(4) for name in names}))
    assert mapped(tmp_path).skipped == {"*.rotary_emb.inv_freq": 3}


def test_tied_head_on_disk_is_counted_and_not_used(tmp_path: Path) -> None:
    write_preset(tmp_path, "v3-tied-eps")
    edit_weights(tmp_path, lambda t: t.update({"lm_head.weight": torch.ones(96, 48)}))
    weights = mapped(tmp_path)
    assert weights.skipped == {"lm_head.weight (tied)": 1}
    assert "lm_head.weight" not in weights.slices
    embedding = weights.read("model.embed_tokens.weight")
    assert torch.equal(weights.read("lm_head.weight"), embedding)
    assert torch.equal(weights.read_parameter("lm_head.weight"), embedding)


def test_tied_head_of_another_shape(tmp_path: Path) -> None:
    write_preset(tmp_path, "v3-tied-eps")
    edit_weights(tmp_path, lambda t: t.update({"lm_head.weight": torch.ones(95, 48)}))
    error = refused(tmp_path)
    assert error.code == "CKPT-SHAPE" and "lm_head.weight" in error.message


def test_a_sharded_checkpoint(tmp_path: Path) -> None:
    whole = mapped(write_tiny(tmp_path / "whole"))
    parts = mapped(write_tiny(tmp_path / "parts", max_shard_size="60KB"))
    assert len(parts.checkpoint.files) > 2
    for name in whole.slices:
        assert torch.equal(whole.read(name), parts.read(name))


@pytest.mark.parametrize("layers", [1, 3], ids=["config-has-fewer", "config-has-more"])
def test_a_layer_count_that_differs(tmp_path: Path, layers: int) -> None:
    edit_config(write_tiny(tmp_path), num_hidden_layers=layers, first_k_dense_replace=1)
    error = refused(tmp_path)
    assert error.code == "CKPT-LAYERS"
    assert f"hold 2 layers, num_hidden_layers in config.json is {layers}" in error.message


def test_missing_tensors_are_listed_up_to_ten(tmp_path: Path) -> None:
    gone = [f"{EXPERTS}.{e}.{p}.weight" for e in range(2, 6) for p in ("up_proj", "down_proj")]
    gone += [f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1)]
    gone += ["model.norm.weight", "lm_head.weight"]
    write_tiny(tmp_path)
    edit_weights(tmp_path, lambda tensors: [tensors.pop(name) for name in gone])  # type: ignore[arg-type]
    error = refused(tmp_path)
    assert error.code == "CKPT-MISSING"
    assert error.message.startswith("12 tensors")
    assert error.message.endswith("and 2 more")
    assert len(error.details["tensors"]) == 10 and set(error.details["tensors"]) <= set(gone)


def test_extra_tensors_are_named(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    edit_weights(tmp_path, lambda t: t.update({f"extra.{i}": torch.ones(1) for i in range(11)}))
    error = refused(tmp_path)
    assert error.code == "CKPT-EXTRA"
    assert (
        "11 tensors" in error.message and "extra.0" in error.message and "1 more" in error.message
    )


def test_a_shape_message_says_what_the_config_implies(tmp_path: Path) -> None:
    edit_config(write_tiny(tmp_path), v_head_dim=9)
    error = refused(tmp_path)
    assert error.code == "CKPT-SHAPE"
    assert "kv_b_proj.weight' is [64, 16], config.json implies [68, 16]" in error.message
    assert "(heads 4 x (nope 8 + value 9), rank 16)" in error.message
    assert "v_head_dim" in error.hint


def test_experts_of_two_dtypes(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    name = f"{EXPERTS}.3.up_proj.weight"
    edit_weights(tmp_path, lambda t: t.update({name: t[name].half()}))
    assert refused(tmp_path).code == "CKPT-DTYPE"


def test_a_weight_of_integers(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    edit_weights(tmp_path, lambda t: t.update({"model.norm.weight": torch.ones(48).int()}))
    error = refused(tmp_path)
    assert error.code == "CKPT-DTYPE" and "model.norm.weight' is I32" in error.message


@pytest.mark.parametrize(
    ("family", "sibling"),
    [("deepseek_v3", "deepseek_v2"), ("deepseek_v2", "deepseek_v3"), ("youtu", "deepseek_v3")],
)
def test_the_model_type_of_a_sibling(tmp_path: Path, family: str, sibling: str) -> None:
    """Named at once by the class name; without one, by the tensors that the sibling lacks."""
    write_tiny(tmp_path, family)
    edit_config(tmp_path, model_type=sibling)
    assert refused(tmp_path).code == "CFG-FAMILY"
    edit_config(tmp_path, "architectures", first_k_dense_replace=1)
    assert refused(tmp_path).code in ("CKPT-EXTRA", "CKPT-MISSING")
