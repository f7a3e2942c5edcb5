"""The families' tiny configs: one row for each model type, and the variations of it.

Four layers hold every kind of layer that the family has. Indexers have 16 heads, which leaves no
two scores equal (with two the relu zeroes many), and select few enough keys to matter within 40
tokens. Fields are spelled as the family's own config class spells them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.tiny import EXPERTS, LONGROPE, SIZES, YARN_ALL_DIM

_SIZES: dict[str, Any] = {**SIZES, "num_hidden_layers": 4, "num_key_value_heads": 4}
_GROUPS: dict[str, Any] = {"n_group": 4, "topk_group": 2}
_INDEXER: dict[str, Any] = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 16}
_FULL_SHARED = ["full", "shared", "full", "shared"]
# Kimi and Bailing spell their expert fields another way.
_KIMI_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 20,
    "num_experts": 8,
    "num_experts_per_token": 3,
    "num_shared_experts": 1,
    "num_expert_group": 4,
    "topk_group": 2,
}

# Position 20 already scales the query: floor(20 / 16) is not 0.
_MISTRAL4_ROPE: dict[str, Any] = {
    **YARN_ALL_DIM,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.3,
    "partial_rotary_factor": 0.5,
}
_LARGE4_ROPE: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 1.0,
}

_MISTRAL4: dict[str, Any] = {
    **_SIZES, **EXPERTS, **_GROUPS,
    "first_k_dense_replace": 1, "rope_parameters": _MISTRAL4_ROPE,
}  # fmt: skip
_DEEPSEEK_V3: dict[str, Any] = {
    **_SIZES, **EXPERTS, **_GROUPS, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1,
}  # fmt: skip
# Sliding layers have other sizes than indexed ones, each a number of its own.
_DOTS3: dict[str, Any] = {
    **_SIZES, **EXPERTS, **_INDEXER,
    "head_dim": 16,
    "layer_types": ["indexed_attention", "sliding_attention"] * 2,
    "first_k_dense_replace": 1,
    "shared_experts_intermediate_size": 20,
    "sliding_window": 12,
    "rope_theta": 80000.0,
    "swa_rope_theta": 500.0,
    "swa_num_attention_heads": 3,
    "swa_num_key_value_heads": 3,
    "swa_q_lora_rank": 20,
    "swa_kv_lora_rank": 24,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 12,
    "swa_qk_rope_head_dim": 4,
    "swa_v_head_dim": 6,
}  # fmt: skip
_LARGE4: dict[str, Any] = {
    **{k: v for k, v in _SIZES.items() if k != "q_lora_rank"}, **EXPERTS, **_GROUPS, **_INDEXER,
    "first_k_dense_replace": 1,
    "no_rope_layers": [1, 1, 0, 0],
    "kv_source_layers": [0, 0, 2, 2],
    "indexer_types": ["full", "shared", "full", "full"],
    "final_logit_softcapping": 3.0,
    "rope_parameters": _LARGE4_ROPE,
}  # fmt: skip
_GLM5: dict[str, Any] = {
    **_SIZES, **EXPERTS, **_INDEXER,
    "qk_rope_head_dim": 0,
    "qk_nope_head_dim": 12,
    "layer_types": [
        "linear_attention", "indexed_attention", "indexed_attention", "linear_attention"
    ],
    "indexer_types": ["full", "full", "shared", "full"],
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "index_kpool": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 3,
    "linear_conv_kernel_dim": 3,
    "swiglu_limit": 0.5,
    "hc_mult": 2,
    "hc_sinkhorn_iters": 3,
}  # fmt: skip
_HY_V4: dict[str, Any] = {
    **_SIZES, **EXPERTS, **_INDEXER,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "indexer_types": _FULL_SHARED,
    "swiglu_limit": 0.5,
    "hc_mult": 2,
}  # fmt: skip
_LINEAR_FULL = ["linear_attention", "full_attention"] * 2

_TINY_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 4,
}
_PIXTRAL: dict[str, Any] = {
    **_TINY_VISION, "model_type": "pixtral", "image_size": 16, "head_dim": 8, "hidden_act": "silu",
}  # fmt: skip
_KIMI_VISION: dict[str, Any] = {
    **_TINY_VISION, "pos_emb_height": 4, "pos_emb_width": 4, "pos_emb_time": 2,
}  # fmt: skip
_GLM5_VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "depth": 1, "num_heads": 2, "patch_size": 4,
    "image_size": 16, "out_hidden_size": 48, "projection_intermediate_size": 24,
}  # fmt: skip
_HY_VISION: dict[str, Any] = {**_TINY_VISION, "out_hidden_size": 48, "max_image_size": 16}
_DOTS3_VISION: dict[str, Any] = {
    **_TINY_VISION,
    "num_hidden_layers": 2,
    "mlp_layer_types": ["dense", "sparse"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "adapter_in_dim": 16,
    "adapter_out_dim": 48,
}
_DOTS3_AUDIO: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 32, "feature_size": 16, "downsample_hidden_size": 8,
    "adapter_input_size": 16, "adapter_out_dim": 48,
}  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """One checkpoint. `parts`: the sub-configs of a wrapper besides its text model.

    `mtp`: the prefix of multi-token-prediction tensors on disk, where the family ships them.
    `top`: further fields of the wrapper.
    """

    model_type: str
    fields: dict[str, Any]
    wrapper: str = ""
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    mtp: str = ""
    top: dict[str, Any] = field(default_factory=dict)


_BASE: dict[str, Preset] = {
    "deepseek_v2": Preset(
        "deepseek_v2", {**_SIZES, **EXPERTS, "n_shared_experts": 2, "first_k_dense_replace": 1}
    ),
    "deepseek_v3": Preset("deepseek_v3", _DEEPSEEK_V3, mtp="model.layers.4."),
    "deepseek_v32": Preset(
        "deepseek_v32",
        {**_SIZES, **EXPERTS, **_GROUPS, **_INDEXER, "first_k_dense_replace": 1,
         "num_nextn_predict_layers": 1},
        mtp="model.layers.4.",
    ),
    "glm4_moe_lite": Preset(
        "glm4_moe_lite", {**_SIZES, **EXPERTS, "num_nextn_predict_layers": 1},
        mtp="model.layers.4.",
    ),
    "glm_moe_dsa": Preset(
        "glm_moe_dsa",
        {**_SIZES, **EXPERTS, **_INDEXER, "first_k_dense_replace": 1,
         "indexer_types": _FULL_SHARED, "num_nextn_predict_layers": 1},
        mtp="model.layers.4.",
    ),
    "longcat_flash": Preset(
        "longcat_flash",
        {**{k: v for k, v in _SIZES.items() if k not in ("num_hidden_layers", "intermediate_size")},
         "num_layers": 2, "head_dim": 8, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 20,
         "n_routed_experts": 8, "zero_expert_num": 4, "moe_topk": 4, "num_nextn_predict_layers": 1},
        mtp="model.mtp.layers.0.",
    ),
    "minicpm3": Preset("minicpm3", {**_SIZES, "dim_model_base": 24}),
    "sarvam_mla": Preset(
        "sarvam_mla",
        {**_SIZES, **EXPERTS, "q_lora_rank": None, "first_k_dense_replace": 1,
         "rope_parameters": YARN_ALL_DIM},
    ),
    "youtu": Preset("youtu", _SIZES),
    "mistral4": Preset("mistral4", _MISTRAL4),
    "axk1": Preset(
        "axk1", {**_SIZES, **EXPERTS, **_GROUPS, "first_k_dense_replace": 1}
    ),
    "axk2": Preset(
        "axk2", {**_SIZES, **EXPERTS, **_INDEXER, "first_k_dense_replace": 1, "gated_norm_rank": 4}
    ),
    "kimi_linear": Preset(
        "kimi_linear",
        {**_SIZES, **_KIMI_EXPERTS, "q_lora_rank": None, "layer_types": _LINEAR_FULL,
         "linear_head_dim": 8, "linear_num_heads": 3, "linear_conv_kernel_dim": 3},
    ),
    "bailing_hybrid": Preset(
        "bailing_hybrid",
        {**_SIZES, **_KIMI_EXPERTS, "q_lora_rank": None, "layer_types": _LINEAR_FULL,
         "first_k_dense_replace": 1, "head_dim": 12, "short_conv_kernel_size": 3,
         "rope_theta": 60000.0, "num_nextn_predict_layers": 1},
        mtp="model.layers.4.",
    ),
    "hy_v4": Preset("hy_v4", _HY_V4, mtp="model.mtp_layers.0."),
    "dots3_note_text": Preset("dots3_note_text", _DOTS3, mtp="model.mtp.layers.0."),
    # Wrappers: the text model stands in text_config.
    "kimi_k25": Preset(
        "deepseek_v3", _DEEPSEEK_V3, "kimi_k25", {"vision_config": _KIMI_VISION},
        top={"projection_hidden_size": 16},
    ),
    "mistral3": Preset("mistral4", _MISTRAL4, "mistral3", {"vision_config": _PIXTRAL}),
    "dots3_note": Preset(
        "dots3_note_text", _DOTS3, "dots3_note",
        {"vision_config": _DOTS3_VISION, "audio_config": _DOTS3_AUDIO}, mtp="model.mtp.layers.0.",
    ),
    "mistral_large4": Preset(
        "mistral_large4_text", _LARGE4, "mistral_large4", {"vision_config": _PIXTRAL},
        mtp="mtp_dspark.layers.0.",
    ),
    "glm5_next": Preset(
        "glm5_next_text", _GLM5, "glm5_next", {"vision_config": _GLM5_VISION},
        mtp="model.language_model.layers.4.",
    ),
    "hy_v4_vl": Preset(
        "hy_v4_vl_text",
        {**_HY_V4, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                       "mrope_section": [2, 1, 1]}},
        "hy_v4_vl", {"vision_config": _HY_VISION}, mtp="model.mtp_layers.0.",
    ),
}  # fmt: skip

_HALF = {"rope_interleave": False}
_NO_QUERY_RANK = {"q_lora_rank": None}
_BIAS = {"attention_bias": True}
_WIDE = {"qk_nope_head_dim": 12, "v_head_dim": 20}
_TIED = {"tie_word_embeddings": True}


def _heads(count: int) -> dict[str, int]:
    return {"num_attention_heads": count, "num_key_value_heads": count, "hidden_size": 16 * count}


# name -> (base preset, overrides of the text model's fields)
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2-lite": ("deepseek_v2", {**_NO_QUERY_RANK, "rope_parameters": YARN_ALL_DIM}),
    "deepseek_v2-groups": (
        "deepseek_v2",
        {**_GROUPS, **_BIAS, "topk_method": "group_limited_greedy", "routed_scaling_factor": 2.0},
    ),
    "deepseek_v3-half": ("deepseek_v3", {**_HALF, **_heads(3)}),
    "deepseek_v3-yarn": ("deepseek_v3", {**_WIDE, "rope_parameters": YARN_ALL_DIM}),
    "deepseek_v3-no-query-rank": ("deepseek_v3", {**_NO_QUERY_RANK, **_BIAS}),
    "deepseek_v3-tied": ("deepseek_v3", {**_TIED, "rms_norm_eps": 1e-2}),
    "deepseek_v32-yarn": ("deepseek_v32", {**_WIDE, **_BIAS, "rope_parameters": YARN_ALL_DIM}),
    "glm4_moe_lite-half": ("glm4_moe_lite", {**_HALF, **_WIDE, **_heads(5), **_NO_QUERY_RANK}),
    "glm_moe_dsa-all-full": (
        "glm_moe_dsa",
        {**_WIDE, **_heads(3), "indexer_types": ["full"] * 4, "rope_parameters": YARN_ALL_DIM},
    ),
    "longcat_flash-yarn": ("longcat_flash", {**_WIDE, **_BIAS, "rope_parameters": YARN_ALL_DIM}),
    "longcat_flash-no-zero-experts": ("longcat_flash", {**_heads(3), "zero_expert_num": 0}),
    "minicpm3-longrope": ("minicpm3", {"rope_parameters": LONGROPE}),
    "minicpm3-untied": (
        "minicpm3", {**_NO_QUERY_RANK, **_BIAS, **_heads(3), "tie_word_embeddings": False}
    ),
    "youtu-half": ("youtu", {**_HALF, **_BIAS, **_heads(5), **_WIDE}),
    "youtu-padding": ("youtu", {"pad_token_id": 5}),  # whose row the class sets to zero
    "youtu-untied": ("youtu", {**_NO_QUERY_RANK, "tie_word_embeddings": False}),
    "mistral4-half": (
        "mistral4",
        {**_HALF, **_BIAS, "rope_parameters": {**_MISTRAL4_ROPE, "mscale_all_dim": 0.5}},
    ),
    "mistral4-no-query-rank": ("mistral4", {**_NO_QUERY_RANK, **_heads(3), **_TIED}),
    "axk1-half": ("axk1", {**_HALF, **_WIDE, **_BIAS, "rope_parameters": YARN_ALL_DIM}),
    "axk1-every-second": ("axk1", {**_heads(3), "moe_layer_freq": 2}),
    "axk2-groups": ("axk2", {**_GROUPS, **_WIDE, **_BIAS, "rope_parameters": YARN_ALL_DIM}),
    "axk2-odd-heads": ("axk2", {**_heads(5), **_TIED}),
    "kimi_linear-query-rank": (
        "kimi_linear",
        {"q_lora_rank": 24, **_heads(3), **_WIDE, "num_expert_group": 1, "topk_group": 1},
    ),
    "kimi_linear-dict": (
        "kimi_linear",
        {"layer_types": None, "first_k_dense_replace": 2,
         "linear_attn_config": {"head_dim": 6, "num_heads": 5, "short_conv_kernel_size": 4,
                                "full_attn_layers": [3, 4], "kda_layers": [1, 2]}},
    ),
    "bailing_hybrid-groups-of-two": (
        "bailing_hybrid",
        {"layer_types": None, "layer_group_size": 2, "kda_safe_gate": False, **_WIDE, **_BIAS},
    ),
    "hy_v4-odd-heads": ("hy_v4", {**_heads(3), **_WIDE, "indexer_types": ["full"] * 4}),
    "hy_v4-wide": ("hy_v4", {**_BIAS, "hc_mult": 3, "swiglu_limit": 0.0}),
    "dots3_note_text-groups": (
        "dots3_note_text", {**_GROUPS, **_BIAS, "use_dsa": False, "first_k_dense_replace": 2}
    ),
    "kimi_k25-tied": ("kimi_k25", {**_TIED}),
    "mistral_large4-no-sharing": (
        "mistral_large4",
        {**_heads(3), **_BIAS, "kv_source_layers": None, "indexer_types": _FULL_SHARED,
         "no_rope_layers": None},
    ),
    "glm5_next-no-lower-bound": (
        "glm5_next",
        {**_heads(3), **_BIAS, "linear_lower_bound": None, "index_kpool_always_select_tail": False},
    ),
}  # fmt: skip


def _varied(base: str, overrides: dict[str, Any]) -> Preset:
    preset = _BASE[base]
    return Preset(
        preset.model_type,
        {**preset.fields, **overrides},
        preset.wrapper,
        preset.parts,
        preset.mtp,
        preset.top,
    )


PRESETS: dict[str, Preset] = {
    **_BASE,
    **{name: _varied(base, overrides) for name, (base, overrides) in _VARIANTS.items()},
}
