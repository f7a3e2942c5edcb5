"""The tables of names against transformers' own, for every family."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from mla_deploy.checkpoint import names
from mla_deploy.checkpoint.names import EXPERT_NAME, STACKED, spelled_for, text_names
from mla_deploy.errors import InputError
from tests.families import FAMILIES, family_model, write_family


def on_disk(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", "pt") as opened:
        return sorted(opened.keys())


def renamer(model: Any) -> Any:
    """transformers' renaming of a name on disk into one of the module's."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    transforms = get_model_conversion_mapping(model)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    state = model.state_dict()

    def rename(name: str) -> str:
        found, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        return str(found)

    return rename


def as_parameter(canonical: str) -> str:
    """The parameter that a canonical name is, or is a part of."""
    match = EXPERT_NAME.fullmatch(canonical)
    if match:
        part = match["part"] or canonical.removesuffix(".weight").rpartition(".")[2]
        fused = "down_proj" if part in ("down_proj", "w2") else "gate_up_proj"
        return f"{match['prefix']}.experts.{fused}"
    for ending, parts in STACKED.items():
        for part in parts:
            if canonical.endswith(part):
                return canonical.removesuffix(part) + ending
    return canonical


@pytest.mark.parametrize("name", FAMILIES)
def test_as_transformers_renames(tmp_path: Path, name: str) -> None:
    """Each name that save_pretrained writes becomes the parameter that transformers makes of it."""
    model = family_model(name)
    rename = renamer(model)
    decoder = "model.language_model." if FAMILIES[name].wrapper else "model."
    parameters = {
        f"model.{k.removeprefix(decoder)}" if k.startswith(decoder) else k
        for k in model.state_dict()
        if k.startswith(decoder) or not k.startswith("model.")
    }
    found = text_names(on_disk(write_family(tmp_path, name, mtp=False))).on_disk
    made = set()
    for canonical, disk in found.items():
        theirs = rename(disk)
        if not theirs.startswith(decoder) and theirs.startswith("model."):
            continue  # of a tower
        if theirs.startswith(decoder):
            theirs = f"model.{theirs.removeprefix(decoder)}"
        ours = as_parameter(spelled_for(canonical, parameters))
        assert ours == theirs, disk
        made.add(ours)
    tied = {"lm_head.weight"} & set(model.all_tied_weights_keys)
    assert made == parameters - tied


def test_no_spelling_is_idle(tmp_path: Path) -> None:
    """Each row of the table renames something in some family's checkpoint, or is listed here."""
    published_only = {r"\.hc_(?:mlp_layer\.hc|ffn)_(fn|base|scale)$"}
    idle = {pattern for pattern, _ in names._SPELLINGS} - published_only
    for name in FAMILIES:
        for disk in on_disk(write_family(tmp_path / name, name)):
            template = re.sub(r"(?<=\.)\d+(?=\.)", "#", disk)
            for root in ("language_model.model.", "model.language_model.", "model.", ""):
                if template.startswith(root):
                    rest = template.removeprefix(root)
                    break
            for pattern, ours in names._SPELLINGS:
                if re.search(pattern, rest):
                    idle.discard(pattern)
                rest = re.sub(pattern, ours, rest)
    assert idle == set()


@pytest.mark.parametrize(
    ("disk", "canonical"),
    [
        # Kimi K2.5 as published: save_pretrained calls its layers blocks.
        ("language_model.model.layers.3.mlp.gate.weight", "model.layers.3.mlp.gate.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("language_model.model.embed_tokens.weight", "model.embed_tokens.weight"),
    ],
)
def test_a_wrappers_prefix(disk: str, canonical: str) -> None:
    layer = "language_model.model.layers.0.input_layernorm.weight"
    found = text_names([layer, disk, "vision_tower.layers.0.weight"]).on_disk
    assert found[canonical] == disk and len(found) == 2


@pytest.mark.parametrize(
    ("root", "head"),
    [
        ("model.", "lm_head."),
        ("model.language_model.", "lm_head."),
        ("language_model.model.", "language_model.lm_head."),
        ("language_model.model.", "lm_head."),
        ("language_model.", "lm_head."),
        ("", "output."),
    ],
)
def test_every_place_of_a_text_model(root: str, head: str) -> None:
    disk = [f"{root}layers.11.self_attn.o_proj.weight", f"{root}norm.weight", f"{head}weight"]
    wanted = ["model.layers.11.self_attn.o_proj.weight", "model.norm.weight", "lm_head.weight"]
    assert dict(text_names(disk).on_disk) == dict(zip(wanted, disk, strict=True))


@pytest.mark.parametrize(
    ("disk", "canonical"),
    [
        ("model.hc_head.hc_head_fn", "model.hc_head.hc_fn"),
        ("model.hc_pre.hc_head.hc_head_fn", "model.hc_head.hc_fn"),
        ("model.layers.7.hc_pre.hc_mlp_layer.hc_scale", "model.layers.7.ffn_hc.scale"),
        ("model.layers.7.hc_mlp_layer.hc_scale", "model.layers.7.ffn_hc.scale"),
        ("model.layers.7.hc_ffn_scale", "model.layers.7.ffn_hc.scale"),
        ("model.layers.7.hc_attn_base", "model.layers.7.attn_hc.base"),
        ("model.layers.7.mlp.linear_gate.weight", "model.layers.7.mlp.gate_proj.weight"),
        ("model.layers.7.attention.dense.bias", "model.layers.7.self_attn.o_proj.bias"),
        ("model.layers.7.gate.weight", "model.layers.7.mlp.gate.weight"),
        ("model.layers.7.experts.12.w1.weight", "model.layers.7.mlp.experts.12.w1.weight"),
        ("model.layers.7.shared_experts.w2.weight",
         "model.layers.7.mlp.shared_experts.down_proj.weight"),
        ("model.layers.7.self_attn.indexer.wk.weight",
         "model.layers.7.self_attn.indexer.wk.weight"),
        ("model.layers.7.self_attn.A_log", "model.layers.7.self_attn.forget_gate.A_log"),
        ("model.layers.7.self_attn.forget_gate.A_log",
         "model.layers.7.self_attn.forget_gate.A_log"),
        ("model.layers.7.x#.weight", "model.layers.7.x#.weight"),
    ],
)  # fmt: skip
def test_a_spelling(disk: str, canonical: str) -> None:
    assert dict(text_names(["model.layers.0.a", disk]).on_disk)[canonical] == disk


def test_a_spelling_that_only_some_class_has() -> None:
    query = "model.layers.1.self_attn.q_b_proj.weight"
    fused = "model.layers.1.self_attn.q_gate_proj.weight"
    assert spelled_for(query, {query}) == query
    assert spelled_for(query, {fused}) == fused
    assert spelled_for(query, {query, fused}) == query
    assert spelled_for(query, set()) == query


def test_two_spellings_of_one_weight() -> None:
    one, other = "model.layers.0.attention.o_proj.weight", "model.layers.0.self_attn.dense.weight"
    with pytest.raises(InputError, match=r"attention\.o_proj.*self_attn\.dense") as caught:
        text_names([one, other])
    assert caught.value.code == "CKPT-DUPLICATE"


def test_prediction_layers_are_told_by_what_no_decoder_layer_has() -> None:
    disk = [f"model.layers.{layer}.input_layernorm.weight" for layer in range(4)]
    assert text_names(disk).prediction_layers(3) == frozenset()
    joined = text_names([*disk, "model.layers.3.eh_proj.weight", "model.layers.1.eh_proj.weight"])
    assert joined.prediction_layers(3) == {3}
    assert joined.prediction_layers(2) == {3}
    assert joined.prediction_layers(4) == frozenset()
