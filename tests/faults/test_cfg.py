"""F-CFG: config.json, generated per field and by hand; every refusal names the field."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mla_deploy.checkpoint import map_weights, open_checkpoint
from mla_deploy.config import MAX_CONFIG_BYTES, MlaConfig, parse_config
from mla_deploy.errors import InputError
from tests.checkpoint.edits import edit_config, module_facts
from tests.faults.refused import refused, refused_within_memory
from tests.tiny import LLAMA3, LONGROPE, YARN, YARN_ALL_DIM, write_tiny

# What the tiny checkpoint says, field by field; all are needed.
FIELDS: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "kv_lora_rank": 16,
    "max_position_embeddings": 128,
    "moe_intermediate_size": 20,
    "n_routed_experts": 8,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 2,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "rms_norm_eps": 1e-6,
    "v_head_dim": 8,
    "vocab_size": 96,
}
# Present or not, these must be right when they stand.
OPTIONAL = ("first_k_dense_replace", "n_shared_experts", "num_key_value_heads", "n_group")
GOOD: dict[str, Any] = {
    **FIELDS,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "num_key_value_heads": 4,
    "n_group": 4,
    "topk_group": 2,
}
# A change that the weights of the tiny checkpoint contradict.
CONTRADICTED = [
    "hidden_size", "intermediate_size", "kv_lora_rank", "moe_intermediate_size",
    "n_routed_experts", "num_attention_heads", "num_hidden_layers", "q_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "vocab_size", "n_shared_experts",
    "first_k_dense_replace",
]  # fmt: skip


def parse(*drop: str, **changes: Any) -> MlaConfig:
    fields = {key: value for key, value in GOOD.items() if key not in drop}
    return parse_config(json.dumps({**fields, **changes}).encode())


def with_rope(rope: dict[str, Any], *drop: str, **changes: Any) -> dict[str, Any]:
    fields = {key: value for key, value in rope.items() if key not in drop}
    return {"rope_parameters": {**fields, **changes}}


def test_the_good_config_is_good() -> None:
    parse()
    for rope in (YARN, YARN_ALL_DIM, LONGROPE, LLAMA3):
        parse(**with_rope(rope))


@pytest.mark.parametrize("field", FIELDS)
def test_F_CFG_missing(field: str) -> None:
    if field == "rms_norm_eps":  # transformers' class has one; DeepSeek-VL2 leaves it to that
        assert any(field in note for note in parse(field).notes)
    else:
        refused(lambda: parse(field), "CFG-MISSING", field)


@pytest.mark.parametrize("field", [field for field in FIELDS if field != "q_lora_rank"])
def test_F_CFG_null(field: str) -> None:
    if field == "n_routed_experts":  # a dense model, says the config; the weights say no
        assert parse(n_routed_experts=None).num_experts == 0
    else:
        refused(lambda: parse(**{field: None}), "CFG-MISSING", field)


@pytest.mark.parametrize("value", ["48", 48.5, True, [48], {"a": 1}], ids=repr)
@pytest.mark.parametrize("field", [*FIELDS, *OPTIONAL])
def test_F_CFG_wrong_type(field: str, value: Any) -> None:
    code = "CFG-RANGE" if (field, value) == ("rms_norm_eps", 48.5) else "CFG-TYPE"
    refused(lambda: parse(**{field: value}), code, field)


@pytest.mark.parametrize("value", [0, -1, -(10**18)])
@pytest.mark.parametrize("field", FIELDS)
def test_F_CFG_zero_or_negative(field: str, value: int) -> None:
    if (field, value) == ("n_routed_experts", 0):
        assert parse(n_routed_experts=0).num_experts == 0
    else:
        refused(lambda: parse(**{field: value}), "CFG-RANGE", field)


@pytest.mark.parametrize("value", [2**31, 10**18])
@pytest.mark.parametrize("field", [*FIELDS, *OPTIONAL])
def test_F_CFG_absurd(field: str, value: int) -> None:
    refused_within_memory(lambda: parse(**{field: value}), "CFG-RANGE", field)


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("cfg"))


@pytest.mark.parametrize("field", CONTRADICTED)
def test_F_CFG_off_by_one_against_the_weights(checkpoint_folder: Path, field: str) -> None:
    """One up (two for the rope width, which is even), one down where there is room."""
    good = (checkpoint_folder / "config.json").read_text()
    step = 2 if field == "qk_rope_head_dim" else 1
    found = json.loads(good)[field]
    try:
        for value in (found + step, found - step):
            if value < 1 and field != "first_k_dense_replace":
                continue
            same = {"num_key_value_heads": value} if field == "num_attention_heads" else {}
            free = {"n_group": 1, "topk_group": 1} if field == "n_routed_experts" else {}
            edit_config(checkpoint_folder, **{field: value}, **same, **free)
            with pytest.raises(InputError) as caught:
                checkpoint = open_checkpoint(checkpoint_folder)
                map_weights(checkpoint, *module_facts(checkpoint.config.raw))
            assert caught.value.code in (
                "CKPT-SHAPE", "CKPT-LAYERS", "CKPT-MISSING", "CKPT-EXTRA", "CFG-RANGE",
            ), caught.value  # fmt: skip
            (checkpoint_folder / "config.json").write_text(good)
    finally:
        (checkpoint_folder / "config.json").write_text(good)


# ------------------------------------------------------------------ the sixteen by hand, and more


def test_F_CFG_91_heads_do_not_divide() -> None:
    refused(lambda: parse(num_key_value_heads=3), "CFG-HEADS", "num_key_value_heads")


def test_F_CFG_92_odd_rope_width() -> None:
    refused(lambda: parse(qk_rope_head_dim=7), "CFG-ROPE", "qk_rope_head_dim")


def test_F_CFG_93_model_type_of_a_sibling() -> None:
    refused(lambda: parse(model_type="deepseek_v2"), "CFG-FAMILY", "model_type")


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 0, **with_rope(YARN)},
        {"rope_theta": 5e5, **with_rope(YARN)},
        {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
        {"rope_scaling": {**YARN, "factor": 8.0}, **with_rope(YARN)},
        {"rope_scaling": {"type": "linear", "factor": 4.0}, **with_rope(YARN)},
        {"original_max_position_embeddings": 64, **with_rope(YARN)},
        {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 4.0}},
        {"partial_rotary_factor": 0.5, **with_rope(YARN, partial_rotary_factor=1.0)},
    ],
)
def test_F_CFG_94_rope_settings_disagree(changes: dict[str, Any]) -> None:
    refused(lambda: parse(**changes), "CFG-ROPE-CONFLICT")


@pytest.mark.parametrize("rope_type", ["dynamic", "proportional", "su", "", "YARN"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_F_CFG_95_unknown_rope_type(rope_type: str, key: str) -> None:
    scaling = {key: rope_type, "factor": 4.0}
    refused(lambda: parse(rope_scaling=scaling), "CFG-ROPE", "rope_type", "yarn")


@pytest.mark.parametrize("rope_type", [7, ["yarn"], True])
def test_F_CFG_95_rope_type_of_another_kind(rope_type: Any) -> None:
    refused(lambda: parse(rope_scaling={"type": rope_type}), "CFG-ROPE", "rope_type")


@pytest.mark.parametrize("factor", [0, -1, -0.5])
def test_F_CFG_96_factor_not_above_zero(factor: float) -> None:
    refused(lambda: parse(**with_rope(YARN, factor=factor)), "CFG-RANGE", "factor")


@pytest.mark.parametrize(
    ("rope", "key"),
    [(rope, key) for rope in (YARN, LONGROPE, LLAMA3) for key in rope
     if key in ("original_max_position_embeddings", "short_factor", "long_factor",
                "low_freq_factor", "high_freq_factor")]
    + [(YARN, "factor"), (LLAMA3, "factor")],
    ids=lambda value: value if isinstance(value, str) else value["rope_type"],
)  # fmt: skip
def test_F_CFG_96_rope_setting_missing(rope: dict[str, Any], key: str) -> None:
    refused(lambda: parse(**with_rope(rope, key)), "CFG-MISSING", key)


@pytest.mark.parametrize(
    ("rope", "changes", "key"),
    [
        (YARN, {"factor": "4"}, "factor"),
        (YARN, {"factor": True}, "factor"),
        (YARN, {"beta_fast": "32"}, "beta_fast"),
        (YARN, {"original_max_position_embeddings": 32.5}, "original_max_position_embeddings"),
        (YARN_ALL_DIM, {"mscale": [1]}, "mscale"),
        (LONGROPE, {"long_factor": 1.0}, "long_factor"),
        (LONGROPE, {"long_factor": ["a"] * 4}, "long_factor"),
        (YARN, {"rope_theta": "10000"}, "rope_theta"),
    ],
)
def test_F_CFG_96_rope_setting_of_another_type(
    rope: dict[str, Any], changes: dict[str, Any], key: str
) -> None:
    refused(lambda: parse(**with_rope(rope, **changes)), "CFG-TYPE", key)


@pytest.mark.parametrize(
    ("rope", "changes", "key", "code"),
    [
        (YARN, {"attention_factor": -1.0}, "attention_factor", "CFG-RANGE"),
        (YARN, {"original_max_position_embeddings": 0}, "original_max", "CFG-RANGE"),
        (YARN, {"rope_theta": 1e300}, "rope_theta", "CFG-RANGE"),
        (YARN, {"rope_theta": 1}, "rope_theta", "CFG-ROPE"),
        (YARN_ALL_DIM, {"mscale_all_dim": -1}, "mscale_all_dim", "CFG-RANGE"),
        (LONGROPE, {"short_factor": [1.0, 1.0, 1.0]}, "short_factor", "CFG-ROPE"),
        (LONGROPE, {"long_factor": [1.0, 1.0, 0.0, 1.0]}, "long_factor", "CFG-RANGE"),
        (LONGROPE, {"long_factor": []}, "long_factor", "CFG-ROPE"),
        (LLAMA3, {"high_freq_factor": 1.0}, "high_freq_factor", "CFG-ROPE"),
        (YARN, {"partial_rotary_factor": 0.5}, "partial_rotary_factor", "CFG-ROPE"),
        (YARN, {"full_attention": {"rope_type": "default"}}, "rope_parameters", "CFG-ROPE"),
    ],
)
def test_F_CFG_96_rope_setting_out_of_range(
    rope: dict[str, Any], changes: dict[str, Any], key: str, code: str
) -> None:
    refused(lambda: parse(**with_rope(rope, **changes)), code, key)


def test_F_CFG_97_mscale_alone_means_what_transformers_makes_of_it() -> None:
    assert parse(**with_rope(YARN_ALL_DIM, "mscale")).rope_type == "yarn"
    assert parse(**with_rope(YARN_ALL_DIM, "mscale_all_dim")).rope_type == "yarn"
    refused(lambda: parse(**with_rope(YARN_ALL_DIM, "factor")), "CFG-MISSING", "factor")
    parse(**with_rope(YARN_ALL_DIM, "mscale", attention_factor=1.0))
    parse(**with_rope(YARN_ALL_DIM, "mscale_all_dim", mscale=1.0))


@pytest.mark.parametrize("epsilon", [0, -1, -1e-6, 2.0])
def test_F_CFG_98_epsilon(epsilon: float) -> None:
    refused(lambda: parse(rms_norm_eps=epsilon), "CFG-RANGE", "rms_norm_eps")


def test_F_CFG_99_duplicate_key() -> None:
    text = json.dumps(GOOD).replace('"vocab_size"', '"kv_lora_rank"').encode()
    refused(lambda: parse_config(text), "CFG-JSON", "kv_lora_rank", "twice")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e400"])
def test_F_CFG_100_number_that_is_not_finite(number: str) -> None:
    text = json.dumps(GOOD).replace("1e-06", number).encode()
    refused(lambda: parse_config(text), "CFG-JSON")


def test_F_CFG_101_integer_of_5000_digits() -> None:
    text = json.dumps(GOOD).replace("1e-06", "9" * 5000).encode()
    refused(lambda: parse_config(text), "CFG-JSON", "5000 digits")


@pytest.mark.parametrize("opening", ["[", '{"a":'])
@pytest.mark.parametrize("depth", [33, 10_000])
def test_F_CFG_102_nested(opening: str, depth: int) -> None:
    text = opening * depth + "1" + {"[": "]", "{": "}"}[opening[0]] * depth
    whole = '{"kv_lora_rank":' + text + "}"
    refused_within_memory(lambda: parse_config(whole.encode()), "CFG-JSON", "nested")


@pytest.mark.parametrize(
    "change",
    [
        {"auto_map": {"AutoConfig": "canary.Config", "AutoModelForCausalLM": "canary.Model"}},
        {"_attn_implementation_internal": "canary/kernel"},
        {"_attn_implementation": "canary"},
        {"custom_code": "canary.py"},
        {"trust_remote_code": True, "auto_map": {"AutoModel": "canary--canary.Model"}},
    ],
    ids=["F_CFG_103_auto_map", "F_CFG_104_attn_internal", "F_CFG_104_attn", "F_CFG_104_custom",
         "F_CFG_104_trust"],
)  # fmt: skip
def test_keys_that_load_code(tmp_path: Path, change: dict[str, Any]) -> None:
    """A canary module beside the weights is never imported, though the model is built."""
    folder = write_tiny(tmp_path / "model")
    fired = tmp_path / "fired"
    for name in ("canary.py", "configuration_canary.py"):
        (folder / name).write_text(f"open({str(fired)!r}, 'w').close()\nclass Config: pass\n")
    edit_config(folder, **change)
    before = set(sys.modules)
    with open_checkpoint(folder) as checkpoint:
        map_weights(checkpoint, *module_facts(checkpoint.config.raw))
        assert any(next(iter(change)) in note for note in checkpoint.notes)
    assert not fired.exists()
    assert not [name for name in set(sys.modules) - before if "canary" in name]


@pytest.mark.parametrize(
    ("quantization", "method"),
    [({"quant_method": "wobble", "weight_block_size": [128, 128]}, "wobble"),
     ({"quant_method": "bitsandbytes"}, "bitsandbytes"), ({"bits": 4}, "None"),
     ({"quant_method": ["fp8"]}, "fp8"), ("awq", "awq"), ([1], "1")],
)  # fmt: skip
def test_F_CFG_105_quantization(quantization: Any, method: str) -> None:
    refused(lambda: parse(quantization_config=quantization), "CFG-QUANT", method)


def test_F_CFG_106_not_mla() -> None:
    error = refused(
        lambda: parse_config(b'{"model_type": "llama", "hidden_size": 64}'),
        "CFG-NOT-MLA", "llama", "full keys and values", "compress",
    )  # fmt: skip
    assert error.details["field"] == "kv_lora_rank"


@pytest.mark.parametrize(
    "text", [b"", b"  ", b"[]", b"7", b"null", b'"x"', b"{", b"\xff{}", b"{}{}"]
)
def test_F_CFG_107_not_an_object(text: bytes) -> None:
    refused(lambda: parse_config(text), "CFG-JSON")


def test_F_CFG_108_too_large() -> None:
    text = json.dumps({**GOOD, "x": "y" * MAX_CONFIG_BYTES}).encode()
    refused_within_memory(lambda: parse_config(text), "CFG-JSON")


def test_F_CFG_109_no_config(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path)
    (folder / "config.json").unlink()
    refused(lambda: open_checkpoint(folder), "FILE-MISSING", "config.json")


@pytest.mark.parametrize(
    ("changes", "code", "field"),
    [
        ({"num_experts_per_tok": 9}, "CFG-RANGE", "num_experts_per_tok"),
        ({"n_group": 3}, "CFG-EXPERTS", "n_group"),
        ({"topk_group": 5}, "CFG-RANGE", "topk_group"),
        ({"topk_group": None}, "CFG-MISSING", "topk_group"),
        ({"topk_group": 1}, "CFG-EXPERTS", "num_experts_per_tok"),
        ({"first_k_dense_replace": -1}, "CFG-RANGE", "first_k_dense_replace"),
        ({"mlp_layer_types": ["dense"]}, "CFG-RANGE", "mlp_layer_types"),
        ({"routed_scaling_factor": 0}, "CFG-RANGE", "routed_scaling_factor"),
        ({"attention_bias": "yes"}, "CFG-TYPE", "attention_bias"),
        ({"rope_interleave": 1}, "CFG-TYPE", "rope_interleave"),
        ({"tie_word_embeddings": "no"}, "CFG-TYPE", "tie_word_embeddings"),
        ({"torch_dtype": "load"}, "CFG-TYPE", "torch_dtype"),
        ({"hidden_act": 3}, "CFG-TYPE", "hidden_act"),
        ({"eos_token_id": -1}, "CFG-RANGE", "eos_token_id"),
        ({"eos_token_id": ["2"]}, "CFG-TYPE", "eos_token_id"),
        ({"bos_token_id": 1.5}, "CFG-TYPE", "bos_token_id"),
        ({"model_type": None}, "CFG-MISSING", "model_type"),
        ({"model_type": "a/b"}, "CFG-TYPE", "model_type"),
        ({"model_type": 3}, "CFG-TYPE", "model_type"),
        ({"architectures": "X"}, "CFG-TYPE", "architectures"),
        ({"architectures": ["os.system"]}, "CFG-FAMILY", "model_type"),
        ({"architectures": ["../x"]}, "CFG-TYPE", "architectures"),
        ({"rope_parameters": [1]}, "CFG-TYPE", "rope_parameters"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_F_CFG_110_other_fields(changes: dict[str, Any], code: str, field: str) -> None:
    if changes.get("architectures") == ["os.system"]:
        assert parse(**changes).architecture == "os.system"  # a name is never looked up by us
    else:
        refused(lambda: parse(**changes), code, field)
