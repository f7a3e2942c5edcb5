"""F-CFG: fields of a config.json that speak of layers, experts and parts that few families have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mla_deploy.checkpoint import open_checkpoint
from mla_deploy.config import MlaConfig, parse_config
from mla_deploy.errors import InputError
from mla_deploy.source.model import source_weights
from tests.checkpoint.edits import edit_config
from tests.families import FAMILIES, write_family
from tests.faults.refused import refused

BASES = [name for name in FAMILIES if "-" not in name]
WORDS = {
    "layer_types": ["indexed_attention"] * 4,
    "mlp_layer_types": ["dense"] * 4,
    "indexer_types": ["full"] * 4,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("saved")
    return {
        name: json.loads((write_family(folder / name, name) / "config.json").read_text())
        for name in BASES
    }


def parse(whole: dict[str, Any], *drop: str, **changes: Any) -> MlaConfig:
    """`whole` with fields of its text model changed."""
    whole = json.loads(json.dumps(whole))
    text = whole.get("text_config", whole)
    for key in drop:
        text.pop(key, None)
    text.update(changes)
    return parse_config(json.dumps(whole).encode())


@pytest.mark.parametrize("word", ["chunked_attention", "Full_attention", "", 3, None, ["full"]],
                         ids=repr)  # fmt: skip
@pytest.mark.parametrize("field", WORDS)
def test_F_CFG_120_unknown_kind_of_layer(saved: Any, field: str, word: Any) -> None:
    kinds = [*WORDS[field][:2], word, WORDS[field][3]]
    shown = str(word)[:8].strip("[]'")
    refused(
        lambda: parse(saved["glm_moe_dsa"], **{field: kinds}),
        "CFG-LAYER-TYPE", field, "layer 2", shown,
    )  # fmt: skip


@pytest.mark.parametrize("count", [0, 3, 5])
@pytest.mark.parametrize("field", WORDS)
def test_F_CFG_121_list_of_another_length(saved: Any, field: str, count: int) -> None:
    kinds = (WORDS[field] * 2)[:count]
    refused(lambda: parse(saved["hy_v4"], **{field: kinds}), "CFG-RANGE", field, "4 layers")


@pytest.mark.parametrize("value", ["full", {"0": "full"}, 4, True], ids=repr)
@pytest.mark.parametrize(
    "field", [*WORDS, "kv_source_layers", "no_rope_layers", "index_topk_pattern"]
)
def test_F_CFG_122_no_list(saved: Any, field: str, value: Any) -> None:
    if (field, value) == ("index_topk_pattern", "full"):  # four letters, none of which is known
        code, word = "CFG-LAYER-TYPE", "'f'"
    else:
        code, word = "CFG-TYPE", field
    refused(lambda: parse(saved["mistral_large4"], **{field: value}), code, field, word)


@pytest.mark.parametrize(
    "field",
    ["index_topk", "index_head_dim", "index_n_heads", "index_kpool", "sliding_window",
     "linear_head_dim", "linear_num_heads", "linear_conv_kernel_dim", "short_conv_kernel_size",
     "layer_group_size", "no_rope_layer_interval", "gated_norm_rank", "hc_mult",
     "hc_sinkhorn_iters"],
)  # fmt: skip
@pytest.mark.parametrize(
    ("value", "code"),
    [(0, "CFG-RANGE"), (-1, "CFG-RANGE"), (10**12, "CFG-RANGE"), ("8", "CFG-TYPE"),
     (1.5, "CFG-TYPE"), (True, "CFG-TYPE")],
)  # fmt: skip
def test_F_CFG_123_integer(saved: Any, field: str, value: Any, code: str) -> None:
    refused(lambda: parse(saved["glm5_next"], **{field: value}), code, field)


@pytest.mark.parametrize(
    ("name", "changes", "code", "words"),
    [
        # one layer reads the latent of another
        ("mistral_large4", {"kv_source_layers": [0, 0, 1, 3]}, "CFG-RANGE",
         ("kv_source_layers", "layer 2", "layer 1")),
        ("mistral_large4", {"kv_source_layers": [0, 2, 2, 3]}, "CFG-RANGE", ("kv_source_layers",)),
        ("mistral_large4", {"kv_source_layers": [0, 0, 2]}, "CFG-RANGE", ("kv_source_layers",)),
        ("mistral_large4", {"kv_source_layers": [0, -1, 2, 3]}, "CFG-RANGE", ("kv_source",)),
        ("mistral_large4", {"no_rope_layers": [1, 1, 2, 0]}, "CFG-RANGE", ("no_rope_layers",)),
        ("mistral_large4", {"no_rope_layers": [1, 1, 0]}, "CFG-RANGE", ("no_rope_layers",)),
        ("mistral_large4", {"final_logit_softcapping": 0}, "CFG-RANGE", ("softcapping",)),
        ("glm_moe_dsa", {"index_topk_pattern": "FSXS"}, "CFG-LAYER-TYPE", ("'X'", "layer 2")),
        ("glm_moe_dsa", {"index_topk_pattern": "FS"}, "CFG-RANGE", ("index_topk_pattern",)),
        # linear layers
        ("kimi_linear", {"linear_attn_config": 3}, "CFG-TYPE", ("linear_attn_config",)),
        ("kimi_linear", {"linear_attn_config": {"head_dim": 0}}, "CFG-RANGE", ("head_dim",)),
        ("kimi_linear",
         {"layer_types": None,
          "linear_attn_config": {"full_attn_layers": [1, 2], "kda_layers": [3]}},
         "CFG-RANGE", ("no kind for layer 4",)),
        ("kimi_linear",
         {"layer_types": None,
          "linear_attn_config": {"full_attn_layers": [0, 1, 2], "kda_layers": [3, 4]}},
         "CFG-RANGE", ("full_attn_layers",)),
        ("kimi_linear", {"layer_types": ["linear_attention"] * 4}, "CFG-NOT-MLA", ("layer_types",)),
        ("bailing_hybrid", {"kda_safe_gate": 1}, "CFG-TYPE", ("kda_safe_gate",)),
        ("bailing_hybrid", {"kda_lower_bound": "low"}, "CFG-TYPE", ("kda_lower_bound",)),
        ("hy_v4", {"swiglu_limit": True}, "CFG-TYPE", ("swiglu_limit",)),
        ("hy_v4", {"swiglu_limit": 1e12}, "CFG-RANGE", ("swiglu_limit",)),
        ("axk1", {"moe_layer_freq": 0}, "CFG-RANGE", ("moe_layer_freq",)),
        ("axk1", {"moe_layer_freq": [1, 0]}, "CFG-RANGE", ("moe_layer_freq",)),
        ("axk1", {"moe_layer_freq": [1, 0, 2, 0]}, "CFG-TYPE", ("moe_layer_freq",)),
        # widths of single layers
        ("dots3_note_text", {"per_layer_config": []}, "CFG-TYPE", ("per_layer_config",)),
        ("dots3_note_text", {"per_layer_config": {"4": {}}}, "CFG-RANGE", ("'4'", "0 to 3")),
        ("dots3_note_text", {"per_layer_config": {"x": {}}}, "CFG-RANGE", ("'x'",)),
        ("dots3_note_text", {"per_layer_config": {"1": 3}}, "CFG-TYPE", ("per_layer_config.1",)),
        ("dots3_note_text", {"per_layer_config": {"1": {"kv_lora_rank": "a"}}}, "CFG-TYPE",
         ("per_layer_config.1.kv_lora_rank",)),
        ("dots3_note_text", {"swa_kv_lora_rank": 0}, "CFG-RANGE", ("swa_kv_lora_rank",)),
        # rope for each type of layer
        ("dots3_note_text", {"rope_parameters": {"round_attention": {"rope_type": "default"}}},
         "CFG-LAYER-TYPE", ("round_attention",)),
        ("dots3_note_text",
         {"rope_parameters": {"indexed_attention": {"rope_type": "proportional"}}},
         "CFG-ROPE", ("proportional",)),
        ("dots3_note_text",
         {"rope_parameters": {"indexed_attention": {"rope_type": "default",
                                                    "partial_rotary_factor": 0.3}}},
         "CFG-ROPE", ("partial_rotary_factor",)),
        ("mistral4", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0,
                                          "original_max_position_embeddings": 16,
                                          "llama_4_scaling_beta": -1}},
         "CFG-RANGE", ("llama_4_scaling_beta",)),
        # no rotary part
        ("glm5_next", {"rope_theta": 10000.0}, "CFG-RANGE", ("qk_rope_head_dim",)),
        ("deepseek_v3", {"qk_rope_head_dim": 0}, "CFG-RANGE", ("qk_rope_head_dim",)),
        # experts
        ("longcat_flash", {"zero_expert_num": -1}, "CFG-RANGE", ("zero_expert_num",)),
        ("longcat_flash", {"zero_expert_type": "drop"}, "CFG-EXPERTS", ("zero_expert_type",)),
        ("longcat_flash", {"moe_topk": 13}, "CFG-RANGE", ("moe_topk",)),
        ("longcat_flash", {"expert_ffn_hidden_size": 0}, "CFG-RANGE", ("expert_ffn",)),
        ("longcat_flash", {"ffn_hidden_size": 0}, "CFG-RANGE", ("ffn_hidden_size",)),
        ("longcat_flash", {"num_hidden_layers": 3}, "CFG-RANGE", ("num_hidden_layers", "twice")),
        ("longcat_flash", {"num_layers": 0}, "CFG-RANGE", ("num_layers is 0",)),
        ("kimi_linear", {"num_expert_group": 3}, "CFG-EXPERTS", ("num_expert_group",)),
        ("kimi_linear", {"num_shared_experts": -1}, "CFG-RANGE", ("num_shared_experts",)),
        ("kimi_linear", {"n_routed_experts": 16}, "CFG-EXPERTS", ("n_routed_experts", "two names")),
        ("kimi_linear", {"model_max_length": 0}, "CFG-RANGE", ("max_position_embeddings",)),
        ("kimi_k25", {"tie_word_embeddings": 1}, "CFG-TYPE", ("tie_word_embeddings",)),
        ("kimi_k25", {"kv_lora_rank": None}, "CFG-MISSING", ("kv_lora_rank",)),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_F_CFG_124_one_field(
    saved: Any, name: str, changes: dict[str, Any], code: str, words: tuple[str, ...]
) -> None:
    if name == "kimi_k25" and "tie_word_embeddings" in changes:
        saved = {name: {k: v for k, v in saved[name].items() if k not in changes}}
    refused(lambda: parse(saved[name], **changes), code, *words)


@pytest.mark.parametrize("name", ["deepseek_v3", "bailing_hybrid", "mistral_large4"])
def test_F_CFG_125_query_rank_absent(saved: Any, name: str) -> None:
    """Only where no field says that there is none may it be absent."""
    if name == "mistral_large4":
        assert parse(saved[name], "q_lora_rank").q_lora_rank is None
    else:
        refused(lambda: parse(saved[name], "q_lora_rank"), "CFG-MISSING", "q_lora_rank")


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("dots3_note", "swa_kv_lora_rank", 25),
        ("mistral_large4", "no_rope_layers", [1, 1, 1, 0]),
        ("mistral_large4", "kv_source_layers", [0, 1, 2, 2]),
        ("glm_moe_dsa", "indexer_types", ["full", "full", "full", "shared"]),
        ("glm_moe_dsa", "mlp_layer_types", ["dense", "dense", "sparse", "sparse"]),
        ("kimi_linear", "layer_types", ["linear_attention"] * 3 + ["full_attention"]),
        ("longcat_flash", "num_layers", 3),
        ("longcat_flash", "zero_expert_num", 5),
        ("glm5_next", "index_kpool", 2),
        ("hy_v4", "hc_mult", 3),
        ("axk2", "gated_norm_rank", 5),
    ],
)
def test_F_CFG_126_against_the_weights(tmp_path: Path, name: str, field: str, value: Any) -> None:
    folder = write_family(tmp_path, name)
    whole = json.loads((folder / "config.json").read_text())
    text = whole.get("text_config", whole)
    if field.startswith("swa_"):  # saved as widths of each layer
        for widths in text["per_layer_config"].values():
            widths[field.removeprefix("swa_")] = value
    else:
        text[field] = value
    edit_config(folder, **whole)

    with pytest.raises(InputError) as caught, open_checkpoint(folder) as checkpoint:
        source_weights(checkpoint)
    assert caught.value.code in ("CKPT-SHAPE", "CKPT-MISSING", "CKPT-LAYERS", "CKPT-EXTRA")
