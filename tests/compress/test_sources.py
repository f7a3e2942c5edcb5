"""Which classes of transformers `compress` takes: each is exact, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mla_deploy import compress
from mla_deploy.compress.heads_model import HeadsModel
from mla_deploy.compress.parts import empty_model
from mla_deploy.compress.proof import Proof
from mla_deploy.compress.weight_files import open_weight_files
from mla_deploy.config import read_config
from mla_deploy.errors import InputError
from tests.compress.llamas import write_llama

# Classes that are made of Llama's parts, by model_type. What numbers say of them is below.
ALIKE = {
    "cwm", "emu3", "ernie4_5", "exaone", "gemma", "glm", "granite", "helium", "internlm3",
    "iquestcoder", "llama", "ministral", "ministral3", "mistral", "phi3", "qwen2", "seed_oss",
    "smollm3",
}  # fmt: skip
HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 128}


def longrope(pairs: int, **more: Any) -> dict[str, Any]:
    """Factors of every pair, long ones for texts beyond 128 tokens."""
    short = [1.0 + 0.1 * i for i in range(pairs)]
    return {**LONG, "short_factor": short, "long_factor": [3.0 * x for x in short], **more}


EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mha": ("Llama", {"num_key_value_heads": 6}),
    "mqa": ("Llama", {"num_key_value_heads": 1}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "wide-heads": ("Llama", {"head_dim": 32}),
    "llama-longrope": ("Llama", {"rope_parameters": longrope(8)}),
    "llama-linear": ("Llama", {"rope_parameters": {
        "rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "llama-dynamic": ("Llama", {"rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 256}),
    "ministral3": ("Ministral3", {}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 128,
                               "max_window_layers": 1}),
    "phi3": ("Phi3", {}),
    "phi3-partial": ("Phi3", {"rope_parameters": HALF}),
    "phi3-longrope": ("Phi3", {"rope_parameters": longrope(8), "sliding_window": 400,
                               "original_max_position_embeddings": 128}),
    "phi3-longrope-partial": ("Phi3", {
        "rope_parameters": longrope(6, partial_rotary_factor=0.75),
        "original_max_position_embeddings": 128}),
    "glm": ("Glm", {}),
    "ernie": ("Ernie4_5", {"use_bias": True}),
    "helium": ("Helium", {"hidden_size": 96}),
    "granite": ("Granite", {}),
    "seed": ("SeedOss", {}),
    "cwm": ("Cwm", {"layer_types": ["full_attention"] * 2, "sliding_window": 64}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 1]}),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str, tmp_path: Path) -> None:
    """To the end of the longest text that the result takes."""
    family, fields = EXACT[name]
    source = write_llama(tmp_path / "source", family, tokenizer=False, **fields)
    report = compress(source, tmp_path / "out")
    assert report.loss is not None and report.loss.mean_kl < 1e-6 and report.loss.top1 == 1.0
    assert report.cached_values == report.cached_values_source
    load = transformers.AutoModelForCausalLM.from_pretrained
    one, other = (load(each, dtype=torch.float32).eval() for each in (source, tmp_path / "out"))
    longest = other.config.max_position_embeddings
    ids = torch.randint(0, 2048, (1, longest), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        wanted, found = one(input_ids=ids).logits, other(input_ids=ids).logits
    assert (wanted - found).abs().max() < 5e-5 * wanted.abs().max()


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "norms on keys": ("Qwen3", {}, "CMP-KEY-NORM.*k_norm|CMP-KEY-NORM.*q_norm"),
    "norms on keys, two tables": ("Olmo3", {}, "CMP-KEY-NORM"),
    "norms on keys by another name": ("HunYuanDenseV1", {}, "CMP-KEY-NORM.*query_layernorm"),
    "norms of 1 + w": ("Gemma", {}, "CMP-LAYER.*layer 0 of Gemma.*the norm differs"),
    "a layer without rotation": ("SmolLM3", {"no_rope_layers": [1, 0]},
                                 "CMP-LAYER.*layer 1 of SmolLM3.*the attention differs"),
    "a scale that grows far into a text": (
        "Ministral3", {"rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "llama_4_scaling_beta": 0.5,
            "original_max_position_embeddings": 128}},
        "CMP-LAYER.*the attention differs"),
    "norms with means": ("StableLm", {}, "CMP-LAYER.*norms that hold bias, weight"),
    "norms without weights": ("Olmo", {}, "CMP-LAYER.*norms that hold nothing"),
    "an MLP without a gate": ("Arcee", {}, "CMP-LAYER.*MLP of down_proj, up_proj"),
    "an MLP with a norm": ("BitNet", {}, "CMP-LAYER.*attn_sub_norm"),
    "experts": ("Mixtral", {}, "CMP-LAYER.*MLP of experts"),
    "one norm a layer": ("Cohere", {}, "CMP-LAYER.*layers of input_layernorm, mlp, self_attn"),
    "two attentions": ("DiffLlama", {}, "CMP-LAYER.*lambda_k1"),
    "no norm where Llama has it": ("Phi", {}, "CMP-LAYER.*decoder without norm"),
    "no plain attention": ("Mamba", {}, "CMP-LAYER.*cannot be built"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused_with_the_reason(what: str, tmp_path: Path) -> None:
    family, fields, why = REFUSED[what]
    source = write_llama(tmp_path / "source", family, **fields)
    ways: tuple[dict[str, Any], ...] = ({}, {"rank": 32, "rope_dim": 8})
    for options in ways:
        with pytest.raises(InputError, match=f"(?s){why}"):
            compress(source, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_every_class_is_taken_apart_or_refused(model_type: str) -> None:
    """Without weights: whatever a class is made of, other parts than Llama's are refused."""
    named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    name = named if isinstance(named, str) else named[0]
    build = getattr(transformers, name, None)
    if build is None:
        pytest.skip(f"{name} needs a package that is not here")
    try:
        config = build.config_class()
        config.num_hidden_layers = 4
        if getattr(config, "head_dim", 0) is None:
            config.head_dim = 64
    except Exception as error:  # a config without defaults, or whose layers are listed
        pytest.skip(f"{name} has no default config: {type(error).__name__}")
    try:
        empty_model(build, config)
    except InputError as refused:
        assert refused.code in ("CMP-LAYER", "CMP-KEY-NORM")
        assert model_type not in ALIKE
    else:
        assert model_type in ALIKE, "made of Llama's parts: add it, and a case to EXACT or REFUSED"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_of_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    source = write_llama(tmp_path / "whole", tokenizer=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    for given in ("fp32", name):
        report = compress(tmp_path / "shards", tmp_path / given, dtype=given)
        assert report.loss is not None and report.loss.verdict == "exact"


def test_a_rounded_exact_form_is_told_by_its_loss(tmp_path: Path) -> None:
    """fp32 weights written in bf16 lose something, which is no fault of the form."""
    source = write_llama(tmp_path / "source", tokenizer=False)
    report = compress(source, tmp_path / "out", dtype="bf16")
    assert report.loss is not None and 1e-6 < report.loss.mean_kl < 0.3


def test_a_window_shortens_the_text_and_is_told(tmp_path: Path) -> None:
    for window in (64, 16):
        source = write_llama(
            tmp_path / f"{window}", "Mistral", tokenizer=False, sliding_window=window
        )
        report = compress(source, tmp_path / f"out-{window}")
        assert f"slide over {window} tokens of 512" in report.notes[0]
        config = transformers.AutoConfig.from_pretrained(tmp_path / f"out-{window}")
        assert config.max_position_embeddings == window


def test_dynamic_stretching_is_told_and_left_out(tmp_path: Path) -> None:
    """It begins beyond the longest text that the result takes; export knows no such rope."""
    rope = {"rope_type": "dynamic", "rope_theta": 20000.0, "factor": 2.0}
    source = write_llama(tmp_path / "source", tokenizer=False, rope_parameters=rope)
    report = compress(source, tmp_path / "out")
    assert "stretches its rope in texts beyond 512" in report.notes[0]
    assert read_config(tmp_path / "out").raw["rope_parameters"] == {
        "rope_type": "default",
        "rope_theta": 20000.0,
    }


def test_a_tied_head_of_other_values(tmp_path: Path) -> None:
    """Equal to the embedding it is one copy too many; else the model would silently lose it."""
    source = write_llama(tmp_path / "source", tokenizer=False, tie_word_embeddings=True)
    file = source / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors, file)
    assert compress(source, tmp_path / "same").loss is not None
    tensors["lm_head.weight"][3, 5] += 1
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(InputError, match=r"CKPT-TIED.*lm_head"):
        compress(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_overflow_is_no_exact_form(tmp_path: Path) -> None:
    """Written in fp16 a weight becomes infinite, and no loss can be told."""
    source = write_llama(tmp_path / "source", tokenizer=False)
    file = source / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e6
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(InputError, match="CMP-NONFINITE"):
        compress(source, tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()


def test_partial_rotation_by_rank(tmp_path: Path) -> None:
    """What never turns lies in the latent; with nothing cut the loss is that of no rotation."""
    source = write_llama(tmp_path / "source", "Phi3", rope_parameters=HALF)
    whole = compress(source, tmp_path / "whole", rank=48, rope_dim=16)
    assert whole.loss is not None and whole.loss.mean_kl < 1e-6
    cut = compress(source, tmp_path / "cut", rank=24, rope_dim=8)
    assert cut.loss is not None and cut.loss.mean_kl > 1e-3
    with pytest.raises(InputError, match=r"CMP-ROPE.*2 to 16"):
        compress(source, tmp_path / "more", rank=24, rope_dim=18)


def test_the_order_of_pairs_is_found(tmp_path: Path) -> None:
    for family, wanted in (("Llama", False), ("Helium", True)):
        folder = write_llama(tmp_path / family, family, tokenizer=False, hidden_size=96)
        with torch.inference_mode(), open_weight_files(folder) as files:
            source = HeadsModel(files)
            Proof(source).layer(source.layer(0), 0)
            assert source.side_by_side is wanted
