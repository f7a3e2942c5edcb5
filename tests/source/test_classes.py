"""Which class a config leads to: by architectures, by model_type, of the text alone if it can."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mla_deploy.checkpoint import open_checkpoint
from mla_deploy.config import parse_config, read_config
from mla_deploy.errors import InputError
from mla_deploy.source.classes import decoder_path, source_class
from mla_deploy.source.model import (
    empty_model,
    hf_config,
    model_weights,
    module_from_checkpoint,
    optional_weights,
)
from tests.checkpoint.edits import edit_config, edit_weights
from tests.families import FAMILIES, family_model, write_family

IDS = torch.arange(20)[None]


def named(folder: Path) -> tuple[str, str]:
    found = source_class(read_config(folder))
    return found.model.__name__, found.config.__name__


def text_of(name: str, **changes: Any) -> dict[str, Any]:
    """The text model's fields of a preset, as save_pretrained writes them."""
    preset = FAMILIES[name]
    fields = {"model_type": preset.model_type, "q_lora_rank": 24, **preset.fields, **changes}
    return {"rms_norm_eps": 1e-6, **fields}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("deepseek_v3", ("DeepseekV3ForCausalLM", "DeepseekV3Config")),
        ("mistral4", ("Mistral4ForCausalLM", "Mistral4Config")),
        ("kimi_k25", ("DeepseekV3ForCausalLM", "DeepseekV3Config")),
        ("mistral3", ("Mistral4ForCausalLM", "Mistral4Config")),
        ("dots3_note", ("Dots3NoteForCausalLM", "Dots3NoteTextConfig")),
        ("glm5_next", ("Glm5NextForConditionalGeneration", "Glm5NextConfig")),
        ("mistral_large4", ("MistralLarge4ForConditionalGeneration", "MistralLarge4Config")),
    ],
)
def test_the_class_of_a_saved_checkpoint(
    tmp_path: Path, name: str, wanted: tuple[str, str]
) -> None:
    assert named(write_family(tmp_path, name)) == wanted


@pytest.mark.parametrize(
    ("wrapper", "text"),
    [
        # Published with code of its own, under a class name that transformers spells otherwise.
        (["KimiK25ForConditionalGeneration"], {"architectures": ["DeepseekV3ForCausalLM"]}),
        (["KimiK25ForConditionalGeneration"], {"architectures": None}),
        (None, {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2"}),
    ],
)
def test_a_wrapper_published_with_its_own_code(tmp_path: Path, wrapper: Any, text: Any) -> None:
    folder = write_family(tmp_path, "kimi_k25")
    inner = {**json.loads((folder / "config.json").read_text())["text_config"], **text}
    edit_config(
        folder, architectures=wrapper, text_config=inner, auto_map={"AutoModel": "x.KimiK25"}
    )
    assert named(folder) == ("DeepseekV3ForCausalLM", "DeepseekV3Config")
    with open_checkpoint(folder) as checkpoint, torch.no_grad():
        model = module_from_checkpoint(checkpoint)
        assert float((model(IDS).logits - family_model("kimi_k25")(IDS).logits).abs().max()) < 1e-5


def test_a_wrapper_whose_text_type_is_unknown(tmp_path: Path) -> None:
    """transformers' wrapper knows that kimi_k2 is DeepSeek V3: it is built, without its tower."""
    folder = write_family(tmp_path, "kimi_k25")
    inner = json.loads((folder / "config.json").read_text())["text_config"]
    edit_config(folder, text_config={**inner, "model_type": "kimi_k2"})
    assert named(folder) == ("Kimi_K25ForConditionalGeneration", "Kimi_K25Config")
    with open_checkpoint(folder) as checkpoint, torch.no_grad():
        model = module_from_checkpoint(checkpoint)
        assert decoder_path(model) == "model.language_model"
        assert float((model(IDS).logits - family_model("kimi_k25")(IDS).logits).abs().max()) < 1e-5


def test_code_of_its_own_beside_a_known_type(tmp_path: Path) -> None:
    """auto_map says that the class came with the checkpoint; without it, the name is just wrong."""
    folder = write_family(tmp_path, "kimi_linear")
    edit_config(folder, architectures=["KimiForCausalLM"])
    with pytest.raises(InputError, match="KimiForCausalLM") as caught:
        named(folder)
    assert caught.value.code == "SRC-CLASS"
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_kimi.KimiForCausalLM"})
    assert named(folder) == ("KimiLinearForCausalLM", "KimiLinearConfig")
    edit_config(folder, "auto_map", architectures=None)
    assert named(folder) == ("KimiLinearForCausalLM", "KimiLinearConfig")
    edit_config(folder, model_type="somebodys_mla")
    with pytest.raises(InputError, match="SRC-CLASS"):
        named(folder)


@pytest.mark.skipif("sarvam_mla" not in FAMILIES, reason="this transformers has no sarvam_mla")
def test_a_type_that_borrows_a_class_keeps_its_config(tmp_path: Path) -> None:
    """Sarvam's config reads fields that DeepSeek's does not; its own code names its rope type."""
    folder = write_family(tmp_path, "sarvam_mla")
    assert named(folder) == ("DeepseekV3ForCausalLM", "SarvamMLAConfig")
    rope = dict(FAMILIES["sarvam_mla"].fields["rope_parameters"])
    theta = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type").replace("yarn", "deepseek_yarn")
    edit_config(folder, "rope_parameters", rope_scaling=rope, rope_theta=theta,
                architectures=["SarvamMLAForCausalLM"], auto_map={"AutoConfig": "x.Y"})  # fmt: skip
    assert read_config(folder).rope_type == "yarn"
    with open_checkpoint(folder) as checkpoint, torch.no_grad():
        model = module_from_checkpoint(checkpoint)
        wanted = family_model("sarvam_mla")(IDS).logits
        assert float((model(IDS).logits - wanted).abs().max()) < 1e-5


def flat(folder: Path, name: str) -> Path:
    """The text model's fields at the top of config.json, as these publish them."""
    path = folder / "config.json"
    whole = json.loads(path.read_text())
    text = {**whole.pop("text_config"), "model_type": name}
    path.write_text(json.dumps({**whole, **text}))
    return folder


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("dots3_note", "Dots3NoteForCausalLM"), ("glm5_next", "Glm5NextForConditionalGeneration")],
)
def test_text_fields_at_the_top(tmp_path: Path, name: str, wanted: str) -> None:
    folder = flat(write_family(tmp_path, name), name)
    config = read_config(folder)
    assert not config.wrapper_type and "vision_config" in config.towers
    assert "vision_config" in config.whole and "vision_config" not in config.raw
    with open_checkpoint(folder) as checkpoint, torch.no_grad():
        model = module_from_checkpoint(checkpoint)
        assert type(model).__name__ == wanted
        logits = family_model(name)(IDS).logits
        assert float((model(IDS).logits - logits).abs().max()) < 1e-5


def test_a_text_only_checkpoint_of_a_wrapper(tmp_path: Path) -> None:
    """GLM-5.3-Flash without its eyes: no vision_config, no tower on disk."""
    folder = flat(write_family(tmp_path, "glm5_next"), "glm5_next")
    edit_config(folder, "vision_config")
    edit_weights(folder, lambda t: [t.pop(n) for n in list(t) if "visual" in n])  # type: ignore[arg-type]
    with open_checkpoint(folder) as checkpoint, torch.no_grad():
        model = module_from_checkpoint(checkpoint)
        assert float((model(IDS).logits - family_model("glm5_next")(IDS).logits).abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["mistral_large4", "glm5_next"])
def test_only_what_the_text_needs(tmp_path: Path, name: str) -> None:
    model = empty_model(read_config(write_family(tmp_path, name)), FakeTensorMode())
    assert decoder_path(model) == "model.language_model"
    shapes, tied = model_weights(model)
    assert tied == {} and "lm_head.weight" in shapes
    assert all(n.startswith(("model.language_model.", "lm_head.")) for n in shapes)
    state = family_model(name).state_dict()
    assert shapes == {
        n: tuple(v.shape) for n, v in state.items()
        if n.startswith(("model.language_model.", "lm_head."))
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrapper_is_built_in_fp32(tmp_path: Path, dtype: str) -> None:
    folder = write_family(tmp_path, "mistral_large4", dtype=dtype)
    model = empty_model(read_config(folder), FakeTensorMode())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("top", "inner", "wanted"),
    [(True, False, True), (False, True, False), (None, True, True), (None, False, False),
     (None, None, True)],
)  # fmt: skip
def test_a_wrapper_ties_by_its_own_field(
    tmp_path: Path, top: bool | None, inner: bool | None, wanted: bool
) -> None:
    """Then by its text model's; Kimi K2.5 and Mistral 3 are tied when neither says."""
    text = text_of("kimi_k25")
    whole: dict[str, Any] = {"model_type": "kimi_k25", "text_config": text}
    for part, value in ((whole, top), (text, inner)):
        if value is not None:
            part["tie_word_embeddings"] = value
    config = parse_config(json.dumps(whole).encode())
    assert config.tie_word_embeddings is wanted
    assert hf_config(config).tie_word_embeddings is wanted


def test_what_a_class_lets_a_checkpoint_leave_out(tmp_path: Path) -> None:
    def optional(name: str) -> frozenset[str]:
        folder = write_family(tmp_path / name, name)
        return optional_weights(empty_model(read_config(folder), FakeTensorMode()))

    bias = "mlp.gate.e_score_correction_bias"
    assert optional("axk1") == {f"model.layers.{layer}.{bias}" for layer in (1, 2, 3)}
    assert optional("deepseek_v3") == frozenset()
