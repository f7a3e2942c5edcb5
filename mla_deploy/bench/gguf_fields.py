"""The metadata of a GGUF file of architecture deepseek2, and the configs that it can say.

Traps, from llama.cpp's loader: a depth of 26 or 27 layers (48 with a vocabulary of 128256) means
"lite", whose query has no rank, whatever the file says; kv heads are 1, since all heads share the
latent; the rope is the interleaved one; yarn_log_multiplier is a tenth of mscale_all_dim.
"""

from __future__ import annotations

from typing import Any

from mla_deploy.errors import InputError, quoted

FAMILIES = ("deepseek_v2", "deepseek_v3", "youtu")
_LITE_DEPTHS = (26, 27)
_LITE_VOCABULARY = (48, 128256)


def write_fields(writer: Any, config: Any) -> None:
    """Add every field to a GGUFWriter; `config` is transformers' own.

    Raises: InputError BEN-MODEL.
    """
    check_config(config)
    rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
    writer.add_name(config.model_type)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_q_lora_rank(config.q_lora_rank or 0)
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + rope)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(rope)
    _rope_fields(writer, config.rope_parameters)
    _expert_fields(writer, config)
    writer.add_tokenizer_model("no_vocab")


def check_config(config: Any) -> None:
    """Raises: InputError BEN-MODEL for what deepseek2 would compute another way, or not at all."""
    rope = config.rope_parameters
    lite = config.num_hidden_layers in _LITE_DEPTHS or (
        config.num_hidden_layers, config.vocab_size,
    ) == _LITE_VOCABULARY  # fmt: skip
    refused = {
        f"model_type {quoted(config.model_type)}": config.model_type not in FAMILIES,
        "a rope that is not interleaved": not getattr(config, "rope_interleave", True),
        f"rope type {quoted(rope['rope_type'])}": rope["rope_type"] not in ("default", "yarn"),
        "yarn with mscale other than mscale_all_dim": (
            rope.get("mscale") or 1.0) != (rope.get("mscale_all_dim") or rope.get("mscale") or 1.0),
        f"{config.num_hidden_layers} layers and a query rank": lite and bool(config.q_lora_rank),
        f"expert choice {quoted(getattr(config, 'topk_method', ''))}": (
            getattr(config, "topk_method", None) == "group_limited_greedy"),
    }  # fmt: skip
    for what, is_so in refused.items():
        if is_so:
            raise InputError(
                "BEN-MODEL",
                f"llama.cpp's deepseek2 does not run this model: {what}",
                hint="leave llama.cpp out; the other contenders stay",
            )


def _rope_fields(writer: Any, rope: Any) -> None:
    import gguf

    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] != "yarn":
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(float(rope["factor"]))
    writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32))
    writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1))
    if rope.get("mscale_all_dim"):
        writer.add_rope_scaling_yarn_log_mul(0.1 * float(rope["mscale_all_dim"]))


def _expert_fields(writer: Any, config: Any) -> None:
    import gguf

    experts = int(getattr(config, "n_routed_experts", None) or 0)
    layers = config.num_hidden_layers
    dense = min(int(getattr(config, "first_k_dense_replace", layers) or 0), layers)
    dense = dense if experts else layers
    writer.add_leading_dense_block_count(dense)
    writer.add_expert_feed_forward_length(
        int(getattr(config, "moe_intermediate_size", None) or config.intermediate_size)
    )
    writer.add_expert_shared_count(int(getattr(config, "n_shared_experts", None) or 0))
    if dense == layers:
        writer.add_expert_count(0)
        return
    writer.add_expert_count(experts)
    writer.add_expert_used_count(int(config.num_experts_per_tok))
    writer.add_expert_weights_scale(float(config.routed_scaling_factor or 1.0))
    writer.add_expert_weights_norm(bool(config.norm_topk_prob))
    grouped = config.model_type == "deepseek_v3"
    gate = gguf.ExpertGatingFuncType
    writer.add_expert_gating_func(gate.SIGMOID if grouped else gate.SOFTMAX)
    if grouped and (config.n_group or 1) > 1:
        writer.add_expert_group_count(int(config.n_group))
        writer.add_expert_group_used_count(int(config.topk_group))
