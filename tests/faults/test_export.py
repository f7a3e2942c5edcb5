"""Export of a bad checkpoint: refused by name before anything is traced, nothing left on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mla_deploy import export
from mla_deploy.errors import InputError
from tests.checkpoint.edits import (
    WEIGHTS,
    edit_config,
    edit_header,
    edit_index,
    edit_weights,
    joined_file,
)
from tests.faults.conftest import Refuses, listing
from tests.tiny import write_tiny

pytestmark = pytest.mark.usefixtures("untraced")

KV_B = "model.layers.0.self_attn.kv_b_proj.weight"
EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"
ROUTER = "model.layers.1.mlp.gate.weight"
Tensors = dict[str, Any]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A good checkpoint with experts, alone in its parent folder; the bundle would stand there."""
    return write_tiny(tmp_path / "place" / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "place" / "model", max_shard_size="60KB")


# ------------------------------------------------------------------ the set of tensors


@pytest.mark.parametrize("name", ["model.norm.weight", KV_B, EXPERT, ROUTER, "lm_head.weight"])
def test_missing_tensor(model: Path, refuses: Refuses, name: str) -> None:
    edit_weights(model, lambda tensors: tensors.pop(name))
    error = refuses(model, "CKPT-MISSING", name)
    assert error["details"]["tensors"] == [name]


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight",  # of a model without q_lora_rank
        "model.layers.1.mlp.experts.8.up_proj.weight",  # a ninth expert
        "model.layers.0.mlp.gate_proj.bias",
        "adapter.weight",
    ],
)
def test_extra_tensor(model: Path, refuses: Refuses, name: str) -> None:
    import torch

    edit_weights(model, lambda tensors: tensors.update({name: torch.ones(4)}))
    refuses(model, "CKPT-EXTRA", name)


def longer(tensor: Any) -> Any:
    import torch

    return torch.cat([tensor, tensor[:1]])


@pytest.mark.parametrize(
    "name",
    [
        KV_B, EXPERT, ROUTER, "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight",
        "model.layers.0.self_attn.kv_a_layernorm.weight", "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
    ],
)  # fmt: skip
def test_wrong_shape(model: Path, refuses: Refuses, name: str) -> None:
    shapes: dict[str, tuple[int, ...]] = {}

    def change(tensors: Tensors) -> None:
        shapes["wanted"] = tuple(tensors[name].shape)
        tensors[name] = longer(tensors[name])
        shapes["found"] = tuple(tensors[name].shape)

    edit_weights(model, change)
    refuses(model, "CKPT-SHAPE", name, *(str(list(shape)) for shape in shapes.values()))


def test_transposed(model: Path, refuses: Refuses) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(model, lambda tensors: tensors.update({name: tensors[name].T}))
    refuses(model, "CKPT-SHAPE", name, "[48, 64]", "[64, 48]")


@pytest.mark.parametrize("dtype", ["int64", "float64", "float8_e4m3fn", "bool"])
def test_dtype_that_is_not_read(model: Path, refuses: Refuses, dtype: str) -> None:
    import torch

    def change(tensors: Tensors) -> None:
        tensors[EXPERT] = tensors[EXPERT].to(getattr(torch, dtype))

    refuses(edit_weights(model, change), "CKPT-DTYPE", EXPERT)


# ------------------------------------------------------------------ bytes and index


def lying_shape(header: dict[str, Any]) -> None:
    header[KV_B]["shape"] = [1 << 30, 1 << 20]


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        (lambda b: b[:-1], "CKPT-RANGE", WEIGHTS),
        (lambda b: b[: len(b) // 2], "CKPT-RANGE", WEIGHTS),
        (lambda b: b[:5], "CKPT-HEADER", WEIGHTS),
        (lambda b: b + bytes(64), "CKPT-RANGE", WEIGHTS),
        (lambda b: (1 << 62).to_bytes(8, "little") + b[8:], "CKPT-HEADER", WEIGHTS),
        (lambda b: joined_file(b"[]", b), "CKPT-HEADER", WEIGHTS),
        (lambda b: b"version https://git-lfs.github.com/spec/v1\n", "CKPT-LFS", "git lfs pull"),
    ],
    ids=["one_byte_short", "half", "five_bytes", "grown", "lying_length", "no_object", "lfs"],
)
def test_damaged_file(
    model: Path, refuses: Refuses, change: Callable[[bytes], bytes], code: str, named: str
) -> None:
    (model / WEIGHTS).write_bytes(change((model / WEIGHTS).read_bytes()))
    refuses(model, code, named)


def test_lying_header(model: Path, refuses: Refuses) -> None:
    refuses(edit_header(model, lying_shape), "CKPT-RANGE", KV_B)


@pytest.mark.parametrize("path", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_index_that_points_outside(sharded: Path, refuses: Refuses, path: str) -> None:
    whole = write_tiny(sharded.parent / "whole")
    (whole / WEIGHTS).rename(sharded.parent / "outside.safetensors")

    def change(index: Any) -> Any:
        index["weight_map"][KV_B] = path
        return index

    refuses(edit_index(sharded, change), "CKPT-INDEX-PATH", KV_B, path)


def test_missing_shard(sharded: Path, refuses: Refuses) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    refuses(sharded, "CKPT-SHARD-MISSING", shard.name)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_only_pickles(model: Path, refuses: Refuses, name: str) -> None:
    (model / WEIGHTS).rename(model / name)
    refuses(model, "CKPT-FORMAT", name, "safetensors")


def test_weights_that_are_a_link_out_of_the_folder(model: Path, refuses: Refuses) -> None:
    (model / WEIGHTS).rename(model.parent / WEIGHTS)
    (model / WEIGHTS).symlink_to(f"../{WEIGHTS}")
    refuses(model, "FILE-LINK", WEIGHTS)


# ------------------------------------------------------------------ a config of another model


@pytest.mark.parametrize(
    ("changes", "code", "named"),
    [
        ({"num_hidden_layers": 1}, "CKPT-LAYERS", "num_hidden_layers"),
        ({"num_hidden_layers": 3}, "CKPT-LAYERS", "layer 2 is missing"),
        ({"kv_lora_rank": 15}, "CKPT-SHAPE", "kv_lora_rank"),
        ({"kv_lora_rank": 24, "qk_rope_head_dim": 4}, "CKPT-SHAPE", "kv_lora_rank"),
        ({"num_attention_heads": 8, "num_key_value_heads": 8}, "CKPT-SHAPE", "num_attention_heads"),
        ({"num_key_value_heads": 1}, "CFG-HEADS", "num_key_value_heads"),
        ({"qk_nope_head_dim": 12, "v_head_dim": 4}, "CKPT-SHAPE", "v_head_dim"),
        ({"q_lora_rank": 23}, "CKPT-SHAPE", "q_lora_rank"),
        ({"q_lora_rank": None}, "CKPT-MISSING", "self_attn.q_proj.weight"),
        ({"hidden_size": 44}, "CKPT-SHAPE", "hidden_size"),
        ({"vocab_size": 97}, "CKPT-SHAPE", "vocab_size"),
        ({"intermediate_size": 60}, "CKPT-SHAPE", "mlp.gate_proj.weight"),
        ({"moe_intermediate_size": 24}, "CKPT-SHAPE", "mlp.experts.0."),
        ({"n_routed_experts": 12}, "CKPT-SHAPE", "mlp.gate.weight"),
        ({"n_shared_experts": 2}, "CKPT-SHAPE", "mlp.shared_experts."),
        ({"first_k_dense_replace": 0}, "CKPT-MISSING", "model.layers.0.mlp."),
        ({"first_k_dense_replace": 2}, "CKPT-MISSING", "model.layers.1.mlp."),
        ({"attention_bias": True}, "CKPT-MISSING", "bias"),
        ({"model_type": "deepseek_v2"}, "CFG-FAMILY", "model_type"),
        (
            {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"]},
            "CKPT-EXTRA", "e_score_correction_bias",
        ),
        ({"rope_parameters": {"rope_type": "wobble", "rope_theta": 1e4}}, "CFG-ROPE", "wobble"),
        ({"hidden_act": "wobble"}, "CFG-HF", "wobble"),
        ({"architectures": ["DeepseekV9ForCausalLM"]}, "SRC-CLASS", "DeepseekV9ForCausalLM"),
        ({"architectures": ["PreTrainedModel"]}, "SRC-CLASS", "PreTrainedModel"),
        ({"quantization_config": {"quant_method": "wobble"}}, "CFG-QUANT", "wobble"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)  # fmt: skip
def test_config_that_contradicts_the_weights(
    model: Path, refuses: Refuses, changes: dict[str, Any], code: str, named: str
) -> None:
    refuses(edit_config(model, **changes), code, named)


def test_tied_embeddings_that_differ(model: Path, refuses: Refuses) -> None:
    """The config would drop lm_head, which the weights hold and need."""
    error = refuses(
        edit_config(model, tie_word_embeddings=True), "CKPT-TIED", "lm_head.weight",
        "tie_word_embeddings",
    )  # fmt: skip
    assert error["details"]["tensor"] == "lm_head.weight"


def test_a_model_without_a_latent(tmp_path: Path, refuses: Refuses) -> None:
    """A real LlamaForCausalLM checkpoint: what it is, and what the way will be."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "place" / "model"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)
    error = refuses(folder, "CFG-NOT-MLA", "llama", "kv_lora_rank", "compress")
    assert "llama" in error["message"]
    assert "compress" in error["hint"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"kv_lora_rank": NaN}'])
def test_config_that_is_no_config(model: Path, refuses: Refuses, content: str) -> None:
    (model / "config.json").write_text(content)
    refuses(model, "CFG-JSON", "config.json")


def test_no_checkpoint_there(tmp_path: Path, refuses: Refuses) -> None:
    place = tmp_path / "place"
    place.mkdir()
    refuses(place / "none", "FILE-MISSING", "none")
    (place / "file").write_text("mine")
    refuses(place / "file", "FILE-TYPE", "file")
    (place / "empty").mkdir()
    refuses(place / "empty", "FILE-MISSING", "config.json")


# ------------------------------------------------------------------ files that are only copied


def test_tokenizer_that_leads_out_of_the_folder(model: Path, refuses: Refuses) -> None:
    (model.parent / "secret").write_text("{}")
    (model / "tokenizer.json").symlink_to("../secret")
    refuses(model, "FILE-LINK", "tokenizer.json")


def test_tokenizer_that_is_no_file(model: Path, refuses: Refuses) -> None:
    os.mkfifo(model / "tokenizer_config.json")
    refuses(model, "FILE-TYPE", "tokenizer_config.json")


def test_tokenizer_of_65_mebibytes(model: Path, refuses: Refuses) -> None:
    with (model / "tokenizer.json").open("wb") as file:
        file.truncate(65 << 20)
    refuses(model, "FILE-SIZE", "tokenizer.json")


# ------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("options", "exit_status", "code", "named"),
    [
        (("--target", "toaster"), 4, "TARGET-UNKNOWN", "toaster"),
        (("--target", "cuda"), 4, "TARGET-NOT-BUILT", "cuda"),
        (("--dtype", "fp8"), 2, "CLI-USAGE", "'fp8'"),
        (("--cache", "paged"), 2, "CLI-USAGE", "'paged'"),
        (("--cache-layout", "ragged"), 2, "CLI-USAGE", "'ragged'"),
        (("--capacity", "0"), 4, "EXP-OPTION", "capacity is 0"),
        (("--capacity", "-1"), 4, "EXP-OPTION", "capacity is -1"),
        (("--capacity", str(10**18)), 4, "EXP-OPTION", "capacity"),
        (("--capacity", "many"), 2, "CLI-USAGE", "'many'"),
        (("--opset", "20"), 2, "CLI-USAGE", "--opset"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_option_that_export_does_not_know(
    model: Path, refuses: Refuses, options: Any, exit_status: int, code: str, named: str
) -> None:
    refuses(model, code, named, options=options, exit_status=exit_status)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"target": "toaster"}, "TARGET-UNKNOWN"),
        ({"dtype": "fp8"}, "TARGET-DTYPE"),
        ({"cache": "paged"}, "EXP-OPTION"),
        ({"cache_layout": "ragged"}, "EXP-OPTION"),
        ({"capacity": 0}, "EXP-OPTION"),
        ({"capacity": True}, "EXP-OPTION"),
        ({"capacity": 2.5}, "EXP-OPTION"),
        ({"capacity": "64"}, "EXP-OPTION"),
    ],
    ids=repr,
)
def test_option_from_python(model: Path, options: dict[str, Any], code: str) -> None:
    before = listing(model.parent)
    with pytest.raises(InputError) as caught:
        export(model, model.parent / "bundle", **options)
    assert caught.value.code == code
    assert listing(model.parent) == before
