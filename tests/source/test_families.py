"""Every family's checkpoint: all of it accounted for, and loaded as transformers loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mla_deploy.checkpoint import WeightMap, open_checkpoint
from mla_deploy.errors import InputError
from mla_deploy.source.model import module_from_checkpoint, source_weights
from tests.checkpoint.edits import edit_weights
from tests.families import FAMILIES, family_class, write_family

IDS = torch.arange(20)[None] * 7 % 96
# Wrappers, one by one: what is skipped of them by rule, and how many tensors that is.
WRAPPED = {
    "kimi_k25": {"mm_projector.*": 4, "model.mm_projector.*": 2, "vision_tower.*": 17},
    "mistral3": {"multi_modal_projector.*": 4, "vision_tower.*": 11},
    "dots3_note": {"audio_encoder.*": 27, "model.mtp.*": 6, "vision_encoder.*": 39},
    "mistral_large4": {
        "mtp_dspark.*": 6, "patch_merger.*": 1, "pre_mm_projector_norm.*": 1,
        "vision_encoder.*": 11, "vision_language_adapter.*": 2,
    },
    "glm5_next": {"model.language_model.layers.4.*": 6, "model.visual.*": 25},
    "hy_v4_vl": {"model.mtp_layers.*": 6, "vit.*": 25},
}  # fmt: skip
# Where the families that ship them keep what predicts further tokens.
PREDICTION = {
    **dict.fromkeys(
        ("deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "bailing_hybrid"),
        "model.layers.4.*",
    ),
    **dict.fromkeys(("longcat_flash", "dots3_note_text"), "model.mtp.*"),
    "hy_v4": "model.mtp_layers.*",
}
TEXT_CLASS = {
    "kimi_k25": "DeepseekV3ForCausalLM",
    "mistral3": "Mistral4ForCausalLM",
    "dots3_note": "Dots3NoteForCausalLM",
    "mistral_large4": "MistralLarge4ForConditionalGeneration",
    "glm5_next": "Glm5NextForConditionalGeneration",
    "hy_v4_vl": "HYV4VLForConditionalGeneration",
}


def theirs(folder: Path, name: str) -> Any:
    """transformers' own model, its weights in memory of their own.

    Read into place they lie where the file has them, and another alignment rounds otherwise.
    """
    model = family_class(name).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    for weight in model.parameters():
        weight.data = weight.data.clone()
    return model.eval()


def ours(folder: Path) -> Any:
    with open_checkpoint(folder) as checkpoint:
        return module_from_checkpoint(checkpoint)


def mapped(folder: Path) -> WeightMap:
    with open_checkpoint(folder) as checkpoint:
        return source_weights(checkpoint)


def refused(folder: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        mapped(folder)
    return caught.value


def text_state(model: Any) -> dict[str, torch.Tensor]:
    """State of decoder and head, under the names of a model of text alone."""
    state = model.state_dict()
    inside = {
        f"model.{name.removeprefix('model.language_model.')}": value
        for name, value in state.items()
        if name.startswith("model.language_model.")
    }
    if not inside:
        return dict(state)
    return {**inside, **{k: v for k, v in state.items() if not k.startswith("model.")}}


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_loaded_as_transformers_loads_it(tmp_path: Path, name: str) -> None:
    folder = write_family(tmp_path, name)
    mine, wanted = ours(folder), theirs(folder, name)
    assert {p.dtype for p in mine.parameters()} == {torch.float32}
    found, state = text_state(mine), text_state(wanted)
    assert sorted(found) == sorted(state)
    for parameter, value in state.items():
        assert torch.equal(found[parameter], value), parameter
    assert float((mine(IDS).logits - wanted(IDS).logits).abs().max()) < 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_is_accounted_for(tmp_path: Path, name: str) -> None:
    weights = mapped(write_family(tmp_path, name))
    if name in WRAPPED:
        assert weights.skipped == WRAPPED[name]
    elif not FAMILIES[name].wrapper:
        pattern = PREDICTION.get(name.partition("-")[0])
        assert weights.skipped == ({pattern: 6} if pattern else {})


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tensor_too_few(tmp_path: Path, name: str) -> None:
    """A norm, and one matrix of one expert or of a dense layer."""
    folder = write_family(tmp_path, name, mtp=False)
    places = mapped(folder).slices
    down = [n for n in places if n.endswith("down_proj.weight") and ".shared_experts" not in n]
    fused = next(iter(folder.glob("*.safetensors")))
    for module_name in (down[-1], next(n for n in places if n.endswith("norm.weight"))):
        gone = places[module_name].tensor  # type: ignore[union-attr]
        before = fused.read_bytes()
        edit_weights(folder, lambda tensors, gone=gone: tensors.pop(gone))  # type: ignore[misc]
        error = refused(folder)
        assert error.code in ("CKPT-MISSING", "CKPT-LAYERS"), error
        # Named as a model of text alone names it, experts in the style on disk.
        told = module_name.replace("model.language_model.", "model.").rpartition(".experts.")
        assert (told[0] or told[2]) in error.message
        fused.write_bytes(before)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tensor_too_many(tmp_path: Path, name: str) -> None:
    folder = write_family(tmp_path, name, mtp=False)
    place = next(p for n, p in mapped(folder).slices.items() if n.endswith("kv_b_proj.weight"))
    extra = place.tensor.replace("b.weight", "c.weight").replace("b_proj", "c_proj")  # type: ignore[union-attr]
    edit_weights(folder, lambda tensors: tensors.update({extra: torch.ones(3)}))
    error = refused(folder)
    assert error.code == "CKPT-EXTRA" and extra in error.message


@pytest.mark.parametrize("name", [name for name in WRAPPED if name in FAMILIES])
def test_what_a_wrapper_becomes(tmp_path: Path, name: str) -> None:
    """A model of text alone where transformers has one; else the wrapper, without its towers."""
    folder = write_family(tmp_path, name, dtype="bfloat16")
    model = ours(folder)
    assert type(model).__name__ == TEXT_CLASS[name]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not [n for n, _ in model.named_parameters() if "vis" in n or "audio" in n]


@pytest.mark.parametrize("name", ["mistral_large4", "deepseek_v3"])
def test_bfloat16_in_shards(tmp_path: Path, name: str) -> None:
    folder = write_family(tmp_path, name, dtype="bfloat16", max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    wanted = text_state(theirs(folder, name))
    for parameter, value in text_state(ours(folder)).items():
        assert torch.equal(wanted[parameter], value), parameter
