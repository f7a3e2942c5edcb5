"""MlaConfig: both spellings of every field that has two, the arithmetic, and what is dropped."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from mla_deploy.config import MlaConfig, parse_config, read_config
from mla_deploy.errors import InputError
from tests.tiny import TINY_PRESETS, write_preset

# Published by DeepSeek with V2-Lite: the older rope spelling, a null query rank.
V2_LITE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 102400,
}


def parsed(*drop: str, **changes: Any) -> MlaConfig:
    fields = {key: value for key, value in V2_LITE.items() if key not in drop}
    return parse_config(json.dumps({**fields, **changes}).encode())


def test_fields_of_v2_lite() -> None:
    config = parsed()
    assert (config.model_type, config.architecture) == ("deepseek_v2", "DeepseekV2ForCausalLM")
    assert (config.num_layers, config.num_heads, config.hidden_size) == (27, 16, 2048)
    assert (config.kv_lora_rank, config.q_lora_rank) == (512, None)
    assert (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim) == (128, 64, 128)
    assert (config.rope_type, config.rope_original_length, config.rope_factor) == ("yarn", 4096, 40)
    assert (config.num_experts, config.experts_per_token) == (64, 6)
    assert (config.eos_token_ids, config.bos_token_id) == ((100001,), 100000)
    assert not config.tie_word_embeddings


def test_arithmetic_of_v2_lite() -> None:
    config = parsed()
    assert config.row_width == 576
    # 512 (128 + 128) / (1024 - 256)
    assert config.crossover_tokens == pytest.approx(170.67, abs=0.01)
    assert config.cache_bytes_per_token(2) == 27 * 576 * 2 == 31104
    assert config.expanded_bytes_per_token(2) == 27 * 16 * 320 * 2 == 276480


def test_crossover_is_infinite_for_a_small_rank() -> None:
    assert parsed(kv_lora_rank=128).crossover_tokens == math.inf


@pytest.mark.parametrize("name", TINY_PRESETS)
def test_presets_are_read(tmp_path: Path, name: str) -> None:
    config = read_config(write_preset(tmp_path, name))
    family, overrides = TINY_PRESETS[name]
    assert config.model_type == family
    assert config.q_lora_rank == overrides.get("q_lora_rank", 24)
    assert config.v_head_dim == overrides.get("v_head_dim", 8)
    assert config.num_heads == overrides.get("num_attention_heads", 4)
    assert config.rope_type == overrides.get("rope_parameters", {}).get("rope_type", "default")
    assert config.rope_original_length == (None if config.rope_type == "default" else 32)
    assert (config.num_experts, config.experts_per_token) == (
        (0, 0) if family in ("youtu", "minicpm3") else (8, 3)
    )
    assert config.notes == ()


def test_new_rope_spelling_is_the_old_one() -> None:
    rope = {**V2_LITE["rope_scaling"], "rope_theta": 10000.0, "rope_type": "yarn"}
    del rope["type"]
    new = parsed("rope_scaling", "rope_theta", rope_parameters=rope)
    old = parsed()
    for name in ("rope_type", "rope_original_length", "rope_factor"):
        assert getattr(new, name) == getattr(old, name)


def test_both_rope_spellings_may_stand_when_they_agree() -> None:
    rope = {**V2_LITE["rope_scaling"], "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    assert parsed(rope_parameters=rope).rope_type == "yarn"


def test_absent_and_null_rope_settings_are_the_default() -> None:
    for config in (parsed("rope_scaling", "rope_theta"), parsed(rope_scaling=None)):
        assert (config.rope_type, config.rope_factor) == ("default", 1.0)
        assert config.rope_original_length is None


def test_a_wrapper_is_stripped_to_its_text_model() -> None:
    whole = {"model_type": "kimi_k25", "architectures": ["X"], "text_config": V2_LITE,
             "vision_config": {"hidden_size": 9}}  # fmt: skip
    config = parse_config(json.dumps(whole).encode())
    assert (config.model_type, config.hidden_size) == ("deepseek_v2", 2048)
    assert "text_config" not in config.raw and "vision_config" not in config.raw
    assert "only the text model (text_config) is used" in config.notes


def test_routing_that_the_class_does_not_read_is_noted() -> None:
    """The source is transformers' class; a user learns where published code would differ."""
    told = "\n".join(parsed(scoring_func="sigmoid", norm_topk_prob=True).notes)
    assert "scoring_func is 'sigmoid'" in told and "as with softmax" in told
    assert "norm_topk_prob is 'True'" in told
    usual = parsed(scoring_func="softmax", norm_topk_prob=False, topk_method="greedy")
    assert not any("does not read" in note for note in usual.notes)


@pytest.mark.parametrize("inner", [-1, 1.5, True, "x", [1]])
def test_a_text_config_that_is_no_object_is_left_alone(inner: object) -> None:
    assert parsed(text_config=inner).model_type == parsed().model_type


def test_keys_that_could_load_code_are_dropped_and_named() -> None:
    config = parsed(
        _attn_implementation_internal="evil",
        rope_scaling={**V2_LITE["rope_scaling"], "_x": 1},
        attribute_map={"num_hidden_layers": "vocab_size"},
        num_labels=10**9,
    )
    for key in ("auto_map", "_attn_implementation_internal", "attribute_map", "num_labels"):
        assert key not in config.raw
        assert key in " ".join(config.notes)
    assert "_x" not in config.raw["rope_scaling"]
    assert config.digest == parsed().digest


def test_digest_is_of_the_content_not_of_its_spelling() -> None:
    keys = list(V2_LITE)
    random.Random(0).shuffle(keys)
    shuffled = json.dumps({key: V2_LITE[key] for key in keys}, indent=3).encode()
    assert parse_config(shuffled).digest == parsed().digest
    assert parsed(vocab_size=102401).digest != parsed().digest


@pytest.mark.parametrize(
    ("found", "ids"), [(2, (2,)), ([2, 3], (2, 3)), (None, ()), ([], ())], ids=str
)
def test_end_tokens(found: Any, ids: tuple[int, ...]) -> None:
    assert parsed(eos_token_id=found).eos_token_ids == ids


@pytest.mark.parametrize("key", ["n_routed_experts", "num_experts", "num_local_experts"])
def test_experts_under_every_name(key: str) -> None:
    assert parsed("n_routed_experts", **{key: 64}).num_experts == 64


def test_null_experts_is_a_dense_model() -> None:
    config = parsed("moe_intermediate_size", "num_experts_per_tok", n_routed_experts=None)
    assert (config.num_experts, config.experts_per_token) == (0, 0)


def test_value_width_that_minicpm3_leaves_out() -> None:
    config = parsed("v_head_dim", "architectures", model_type="minicpm3")
    assert config.v_head_dim == 2048 // 16
    assert config.raw["v_head_dim"] == 128
    assert parsed("tie_word_embeddings", "architectures", model_type="minicpm3").tie_word_embeddings


def test_an_unknown_family_is_read_by_its_fields() -> None:
    config = parsed("architectures", model_type="somebodys_mla")
    assert (config.model_type, config.architecture) == ("somebodys_mla", "")


def test_a_config_is_checked_however_it_is_made() -> None:
    fields = {key: getattr(parsed(), key) for key in MlaConfig.__dataclass_fields__}
    with pytest.raises(InputError, match="qk_rope_head_dim is 63"):
        MlaConfig(**{**fields, "qk_rope_head_dim": 63})
    with pytest.raises(InputError, match="num_hidden_layers is 0"):
        MlaConfig(**{**fields, "num_layers": 0})


def test_the_longest_text_of_a_tokenizer_without_one_is_read() -> None:
    """transformers writes it into most tokenizer_config.json files."""
    from mla_deploy.strict_json import parse_json

    text = b'{"model_max_length": 1000000000000000019884624838656}'
    found = parse_json(text, what="tokenizer_config.json", code="TOK-CONFIG")
    assert found["model_max_length"] == int(1e30)
