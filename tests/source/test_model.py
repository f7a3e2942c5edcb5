"""The PyTorch source: transformers' own class with every weight from our reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from mla_deploy.checkpoint import open_checkpoint
from mla_deploy.config import read_config
from mla_deploy.errors import InputError
from mla_deploy.source.model import (
    constant_buffers,
    empty_model,
    hf_config,
    model_weights,
    module_from_checkpoint,
)
from tests.tiny import TINY_PRESETS, write_preset, write_tiny

IDS = torch.arange(3, 51)[None]


def ours(folder: Path) -> Any:
    with open_checkpoint(folder) as checkpoint:
        return module_from_checkpoint(checkpoint)


def theirs(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )


@torch.no_grad()
def same_logits(one: Any, other: Any) -> bool:
    return torch.equal(one(IDS).logits, other(IDS).logits)


@pytest.mark.parametrize("preset", TINY_PRESETS)
def test_bit_for_bit_as_from_pretrained(tmp_path: Path, preset: str) -> None:
    folder = write_preset(tmp_path / "c", preset)
    assert same_logits(ours(folder), theirs(folder))


@pytest.mark.parametrize("family", ["deepseek_v3", "minicpm3"])
def test_bfloat16_in_shards(tmp_path: Path, family: str) -> None:
    folder = write_tiny(tmp_path / "c", family, dtype="bfloat16", max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    model = ours(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert same_logits(model, theirs(folder))


def test_ready_for_reference_use(tmp_path: Path) -> None:
    model = ours(write_preset(tmp_path / "c", "youtu"))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight  # tied, not twice
    assert torch.get_default_dtype() == torch.float32


def test_empty_model_holds_no_memory(tmp_path: Path) -> None:
    folder = write_preset(tmp_path / "c", "v3")
    model = empty_model(read_config(folder), FakeTensorMode())
    real = theirs(folder)
    assert {type(p.data).__name__ for p in model.parameters()} == {"FakeTensor"}
    shapes, tied = model_weights(model)
    assert tied == {}
    assert {n: tuple(t.shape) for n, t in real.state_dict().items()} == shapes


def test_tied_names(tmp_path: Path) -> None:
    config = read_config(write_preset(tmp_path / "c", "v3-tied-eps"))
    _, tied = model_weights(empty_model(config, FakeTensorMode()))
    assert tied == {"lm_head.weight": "model.embed_tokens.weight"}


def test_constants_that_no_checkpoint_holds(tmp_path: Path) -> None:
    """MiniCPM scales its embedding by a buffer that is not saved."""
    folder = write_preset(tmp_path / "c", "minicpm3")
    config = read_config(folder)
    found = constant_buffers(empty_model(config, FakeTensorMode()))
    [(name, value)] = found.items()
    assert name == "model.embed_tokens.embed_scale"
    assert type(value) is torch.Tensor
    assert value.item() == pytest.approx(theirs(folder).config.scale_emb)
    assert name not in model_weights(empty_model(config, FakeTensorMode()))[0]


@pytest.mark.parametrize("preset", ["v2", "v3", "youtu", "glm4-lite"])
def test_rotary_tables_are_no_constants(tmp_path: Path, preset: str) -> None:
    config = read_config(write_preset(tmp_path / "c", preset))
    assert constant_buffers(empty_model(config, FakeTensorMode())) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_buffer_that_its_class_leaves_unset_is_refused(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    config = read_config(write_preset(tmp_path / "c", "youtu"))
    model = empty_model(config, FakeTensorMode())
    model.lm_head.register_buffer("odd", torch.ones(2, dtype=dtype), persistent=False)
    with pytest.raises(InputError, match=r"lm_head\.odd") as caught:
        constant_buffers(model)
    assert caught.value.code == "SRC-BUFFER"


def edited(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "EvilForCausalLM",
        "AutoModelForCausalLM",  # no class of a model
        "PreTrainedModel",  # no model of its own
        "DeepseekV3Config",
        "DeepseekV3Model",  # has no head
        "DeepseekV3ForSequenceClassification",
        "torch",
        "__name__",
    ],
)
def test_what_is_no_causal_language_model_is_refused(tmp_path: Path, name: str) -> None:
    folder = edited(write_preset(tmp_path / "c", "v3"), architectures=[name])
    with pytest.raises(InputError, match="SRC-CLASS"):
        hf_config(read_config(folder))


@pytest.mark.parametrize("changes", [{"hidden_act": "no-such-activation"}, {"pad_token_id": 10**9}])
def test_values_that_transformers_refuses(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = edited(write_preset(tmp_path / "c", "v3"), **changes)
    config = read_config(folder)
    with pytest.raises(InputError, match="CFG-HF"):
        empty_model(config, FakeTensorMode())
    assert torch.get_default_dtype() == torch.float32
