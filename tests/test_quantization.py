"""What `quantization_config` means: schemes by method, and every field that is refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_deploy.config import parse_config, read_config
from mla_deploy.errors import InputError
from mla_deploy.quantization import Quantization, WeightScheme, parse_quantization
from tests.checkpoint.quantizers import (
    AWQ_CONFIG,
    FP8_CONFIG,
    GPTQ_CONFIG,
    INT4,
    MODELOPT_CONFIG,
    compressed_config,
)
from tests.faults.test_cfg import GOOD

KEY = "quantization_config"
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)
CONFIGS = [
    FP8_CONFIG,
    AWQ_CONFIG,
    GPTQ_CONFIG,
    MODELOPT_CONFIG,
    compressed_config("pack-quantized", **INT4),
]
FIELDS = sorted({key for config in CONFIGS for key in config} | {
    "quantized_layers", "group_size", "checkpoint_format", "sparsity_config", "kv_cache_scheme",
    "dynamic", "modules_to_not_convert", "scale_fmt",
})  # fmt: skip


def parsed(fields: Any) -> Quantization:
    return parse_quantization(fields, KEY)


def packed(**changes: Any) -> dict[str, Any]:
    return compressed_config("pack-quantized", **{**INT4, **changes})


def float8(**changes: Any) -> dict[str, Any]:
    return compressed_config("float-quantized", num_bits=8, type="float", **changes)


# As published: DeepSeek-V3, Mistral, Kimi-K2, then what AutoAWQ, GPTQModel and ModelOpt write.
MEANINGS: list[tuple[dict[str, Any], list[WeightScheme]]] = [
    ({"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
      "weight_block_size": [128, 128]}, [WeightScheme("fp8", 8, (128, 128))]),
    ({"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"},
     [WeightScheme("fp8", 8, (0, 0))]),
    ({"quant_method": "fp8"},
     [WeightScheme("fp8", 8, (128, 128)), WeightScheme("fp8", 8, (0, 0))]),
    (packed(actorder=None, block_structure=None, dynamic=False, observer="minmax"),
     [WeightScheme("packed", 4, (1, 32))]),
    (packed(symmetric=False), [WeightScheme("packed", 4, (1, 32), False)]),
    (packed(strategy=None, group_size=-1), [WeightScheme("packed", 4, (1, 0))]),
    (packed(strategy=None, group_size=None), [WeightScheme("packed", 4, (0, 0))]),
    (packed(actorder="weight"), [WeightScheme("packed", 4, (1, 32))]),
    (packed(actorder="group"), [WeightScheme("packed", 4, (1, 32), True, True)]),
    (float8(strategy="channel"), [WeightScheme("scaled", 8, (1, 0))]),
    (float8(strategy="block", block_structure=[128, 64]), [WeightScheme("scaled", 8, (128, 64))]),
    (float8(strategy="block", block_structure="128x64"), [WeightScheme("scaled", 8, (128, 64))]),
    (compressed_config("nvfp4-pack-quantized", num_bits=4, type="float",
                       strategy="tensor_group", group_size=16),
     [WeightScheme("nvfp4", 4, (1, 16))]),
    ({"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "version": "GEMM"},
     [WeightScheme("awq", 4, (1, 128), False)]),
    ({"quant_method": "awq", "bits": 4, "group_size": -1, "zero_point": False},
     [WeightScheme("awq", 4, (1, 0), True)]),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True},
     [WeightScheme("gptq", 4, (1, 128), False, True)]),
    ({"quant_method": "gptq", "bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2",
      "dynamic": {"-:.*lm_head.*": {}}}, [WeightScheme("gptq_v2", 8, (1, 0), False)]),
    (MODELOPT_CONFIG, [WeightScheme("nvfp4_modelopt", 4, (1, 16))]),
    ({"quant_method": "modelopt", "quant_algo": "FP8"}, [WeightScheme("scaled", 8, (0, 0))]),
    ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {
        "a": {"quant_algo": "FP8"}, "b": {"quant_algo": "NVFP4", "group_size": 16},
        "c": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, "d": {"quant_algo": "FP8"}}},
     [WeightScheme("scaled", 8, (0, 0)), WeightScheme("nvfp4_modelopt", 4, (1, 16)),
      WeightScheme("scaled", 8, (1, 0))]),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "schemes"), MEANINGS)
def test_what_a_config_offers(fields: dict[str, Any], schemes: list[WeightScheme]) -> None:
    found = parsed(fields)
    assert list(found.schemes) == schemes
    assert found.method == fields["quant_method"]


def test_groups_of_their_own_formats() -> None:
    fields = compressed_config("mixed-precision", **INT4)
    groups = fields["config_groups"]
    groups["group_0"]["format"] = "pack-quantized"
    groups["group_1"] = {
        "format": "float-quantized",
        "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
    }
    groups["group_2"] = {"input_activations": {"num_bits": 8}}
    assert [scheme.layout for scheme in parsed(fields).schemes] == ["packed", "scaled"]


@pytest.mark.parametrize(
    "key", ["modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules"]
)
def test_what_is_left_alone(key: str) -> None:
    assert parsed({**FP8_CONFIG, key: ["lm_head", "re:.*gate$"]}).ignore == (
        "lm_head", "re:.*gate$",
    )  # fmt: skip


def group_says(**weights: Any) -> dict[str, Any]:
    return packed(**weights)


REFUSALS: list[tuple[Any, str, str]] = [
    ({**FP8_CONFIG, "fmt": "e5m2"}, "CFG-QUANT", "fmt"),
    ({**FP8_CONFIG, "expert_dtype": "fp4"}, "CFG-QUANT", "expert_dtype"),
    ({**FP8_CONFIG, "scale_fmt": "log"}, "CFG-QUANT", "scale_fmt"),
    ({**FP8_CONFIG, "weight_block_size": [128]}, "CFG-TYPE", "weight_block_size"),
    ({**FP8_CONFIG, "weight_block_size": 128}, "CFG-TYPE", "weight_block_size"),
    ({**FP8_CONFIG, "weight_block_size": [0, 128]}, "CFG-RANGE", "weight_block_size"),
    ({**FP8_CONFIG, "weight_block_size": [128, 1 << 40]}, "CFG-RANGE", "weight_block_size"),
    ({**FP8_CONFIG, "weight_block_size": [True, 128]}, "CFG-TYPE", "weight_block_size"),
    ({**FP8_CONFIG, "modules_to_not_convert": "lm_head"}, "CFG-TYPE", "modules_to_not_convert"),
    ({"quant_method": "compressed-tensors"}, "CFG-TYPE", "config_groups"),
    (packed() | {"config_groups": {}}, "CFG-TYPE", "config_groups"),
    (packed() | {"config_groups": {"W4A16": ["Linear"]}}, "CFG-QUANT", "W4A16"),
    (packed() | {"format": "marlin-24"}, "CFG-QUANT", "marlin-24"),
    (packed() | {"format": "mxfp4-pack-quantized"}, "CFG-QUANT", "mxfp4-pack-quantized"),
    (packed() | {"format": "mixed-precision"}, "CFG-QUANT", "format"),
    (packed() | {"format": ["a"]}, "CFG-QUANT", "format"),
    (packed() | {"quantization_status": "frozen"}, "CFG-QUANT", "quantization_status"),
    (packed() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "CFG-QUANT", "sparsity"),
    (packed() | {"transform_config": {"config_groups": {"R1": {}}}}, "CFG-QUANT", "transform"),
    (group_says(num_bits=3), "CFG-QUANT", "num_bits"),
    (group_says(num_bits="4"), "CFG-TYPE", "num_bits"),
    (group_says(type="float"), "CFG-QUANT", "type"),
    (group_says(type=["int"]), "CFG-QUANT", "type"),
    (group_says(strategy="token"), "CFG-QUANT", "strategy"),
    (group_says(group_size=0), "CFG-RANGE", "group_size"),
    (group_says(group_size=None), "CFG-TYPE", "group_size"),
    (group_says(strategy="block"), "CFG-QUANT", "strategy"),
    (group_says(strategy="block", block_structure="128"), "CFG-TYPE", "block_structure"),
    (group_says(symmetric="yes"), "CFG-TYPE", "symmetric"),
    (group_says(strategy="tensor", group_size=None, symmetric=False), "CFG-QUANT", "symmetric"),
    ({**AWQ_CONFIG, "version": "gemv"}, "CFG-QUANT", "gemv"),
    ({**AWQ_CONFIG, "backend": "llm-awq"}, "CFG-QUANT", "llm-awq"),
    ({**AWQ_CONFIG, "bits": 8}, "CFG-QUANT", "bits"),
    ({**AWQ_CONFIG, "group_size": 0}, "CFG-RANGE", "group_size"),
    ({**AWQ_CONFIG, "group_size": None}, "CFG-TYPE", "group_size"),
    ({**AWQ_CONFIG, "zero_point": 1}, "CFG-TYPE", "zero_point"),
    ({**GPTQ_CONFIG, "bits": 3}, "CFG-QUANT", "bits"),
    ({**GPTQ_CONFIG, "bits": None}, "CFG-TYPE", "bits"),
    ({**GPTQ_CONFIG, "checkpoint_format": "gptq_p"}, "CFG-QUANT", "gptq_p"),
    ({**GPTQ_CONFIG, "is_marlin_format": True}, "CFG-QUANT", "is_marlin_format"),
    ({**GPTQ_CONFIG, "pack_dtype": "int16"}, "CFG-QUANT", "pack_dtype"),
    ({**GPTQ_CONFIG, "dynamic": {"+:.*": {"bits": 8}}}, "CFG-QUANT", "dynamic"),
    ({**GPTQ_CONFIG, "desc_act": "no"}, "CFG-TYPE", "desc_act"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, "CFG-QUANT", "NVFP4_AWQ"),
    ({"quant_method": "modelopt"}, "CFG-QUANT", "quant_algo"),
    ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "CFG-TYPE", "quantized_layers"),
    ({**MODELOPT_CONFIG, "group_size": "16"}, "CFG-TYPE", "group_size"),
]


@pytest.mark.parametrize(("fields", "code", "named"), REFUSALS)
def test_every_refusal_names_its_field(fields: Any, code: str, named: str) -> None:
    with pytest.raises(InputError) as caught:
        parsed(fields)
    assert caught.value.code == code
    assert named in caught.value.message and caught.value.message.startswith(KEY)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_the_source_never_sees_it(key: str) -> None:
    plain = parse_config(json.dumps(GOOD).encode())
    config = parse_config(json.dumps({**GOOD, key: packed()}).encode())
    assert config.quantization is not None and plain.quantization is None
    assert config.raw == plain.raw and config.digest == plain.digest
    empty = parse_config(json.dumps({**GOOD, key: None}).encode())
    assert empty.quantization is None and empty.raw == plain.raw


def test_beside_a_text_config() -> None:
    whole = {"text_config": GOOD, "quantization_config": FP8_CONFIG}
    config = parse_config(json.dumps(whole).encode())
    assert config.quantization == parsed(FP8_CONFIG)


def test_a_cache_scheme_is_noted() -> None:
    fields = {**packed(), "kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    config = parse_config(json.dumps({**GOOD, KEY: fields}).encode())
    assert any("cache" in note for note in config.notes)


def test_a_file_of_modelopt_s_own(tmp_path: Path) -> None:
    """Its older releases left config.json as it was."""
    beside = {
        "producer": {"name": "modelopt", "version": "0.23.0"},
        "quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]},
    }
    (tmp_path / "config.json").write_text(json.dumps(GOOD))
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(beside))
    found = read_config(tmp_path).quantization
    assert found == Quantization(
        "modelopt", (WeightScheme("nvfp4_modelopt", 4, (1, 16)),), ("lm_head",)
    )
    (tmp_path / "config.json").write_text(json.dumps({**GOOD, KEY: FP8_CONFIG}))
    assert read_config(tmp_path).quantization == parsed(FP8_CONFIG)


@pytest.mark.parametrize(
    ("content", "code"),
    [("[]", "CFG-TYPE"), ('{"quantization": 1}', "CFG-TYPE"), ("{", "CFG-JSON"),
     ('{"quantization": {"quant_algo": "wobble"}}', "CFG-QUANT")],
)  # fmt: skip
def test_a_bad_file_of_modelopt_s_own(tmp_path: Path, content: str, code: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GOOD))
    (tmp_path / "hf_quant_config.json").write_text(content)
    with pytest.raises(InputError) as caught:
        read_config(tmp_path)
    assert caught.value.code == code
    assert "hf_quant_config.json" in caught.value.message


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.sampled_from(CONFIGS),
    st.lists(st.tuples(st.integers(0, 40), ANY), max_size=3),
)
def test_only_our_refusals_escape(fields: dict[str, Any], edits: list[tuple[int, Any]]) -> None:
    """Whatever stands in any field, of the object or of the innermost one."""
    fields = copy.deepcopy(fields)
    places = [(fields, key) for key in FIELDS]
    for group in (fields.get("config_groups") or {}).values():
        places += [(group, key) for key in ("weights", "format", "targets")]
        places += [(group["weights"], key) for key in (*INT4, "block_structure", "actorder")]
    for place, value in edits:
        owner, key = places[place % len(places)]
        owner[key] = value
    try:
        found = parsed(fields)
    except InputError as error:
        assert error.code in ("CFG-QUANT", "CFG-TYPE", "CFG-RANGE")
    else:
        assert all(hash(scheme) and min(scheme.block) >= 0 for scheme in found.schemes)


def test_a_file_of_modelopt_s_own_that_quantises_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GOOD))
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": null}}')
    assert read_config(tmp_path).quantization is None
