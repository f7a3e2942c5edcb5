"""DeepSeek's checkpoints as sparse files: headers as published, data as holes that read as 0.

`sparse.py FOLDER FIELDS DTYPE`, FIELDS replacing those of DeepSeek-V3's config. Names, dtypes and
shapes are the published ones: FP8 e4m3 matrices with fp32 scales for each 128x128 block, bf16
embedding, head, norms and router, an fp32 correction bias, and the multi-token-prediction layer
behind the last. With DTYPE BF16 the same in bf16, without scales. LITE makes it DeepSeek-V2-Lite.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
    "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8,
    "topk_group": 4, "first_k_dense_replace": 3, "moe_layer_freq": 1, "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 1, "vocab_size": 129280, "max_position_embeddings": 163840,
    "rope_theta": 10000, "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
    "rope_scaling": {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
                     "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096},
}  # fmt: skip
LITE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_size": 2048,
    "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
    "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None,
    "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "norm_topk_prob": False,
    "routed_scaling_factor": 1.0, "scoring_func": "softmax", "topk_method": "greedy",
    "num_nextn_predict_layers": 0, "vocab_size": 102400,
}  # fmt: skip
FP8: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                       "weight_block_size": [128, 128]}  # fmt: skip
_SHARD_BYTES = 4_270_000_000  # which gives DeepSeek-V3 its published 163 files
_SIZES = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
Tensor = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


def write_sparse(folder: Path, fields: dict[str, Any], dtype: str = "F8_E4M3") -> Path:
    """Write config, index and shards into `folder`, which is made."""
    config = {**V3, **fields}
    if dtype == "F8_E4M3":
        config["quantization_config"] = FP8
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shards = list(_shards(_tensors(config, dtype)))
    index: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        _write_shard(folder / name, tensors)
        index.update({tensor: name for tensor, _, _ in tensors})
    total = sum(_bytes(tensor) for tensors in shards for tensor in tensors)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def _tensors(config: dict[str, Any], dtype: str) -> Iterator[Tensor]:
    width, vocab = config["hidden_size"], config["vocab_size"]
    layers = config["num_hidden_layers"]
    yield "model.embed_tokens.weight", "BF16", (vocab, width)
    for layer in range(layers + config["num_nextn_predict_layers"]):
        prefix = f"model.layers.{layer}"
        if layer >= layers:
            yield f"{prefix}.embed_tokens.weight", "BF16", (vocab, width)
            yield f"{prefix}.eh_proj.weight", "BF16", (width, 2 * width)
            yield f"{prefix}.shared_head.head.weight", "BF16", (vocab, width)
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                yield f"{prefix}.{norm}.weight", "BF16", (width,)
        for name, shape in _layer(config, layer):
            yield from _stored(f"{prefix}.{name}", shape, dtype)
    yield "model.norm.weight", "BF16", (width,)
    yield "lm_head.weight", "BF16", (vocab, width)


def _layer(config: dict[str, Any], layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    rank, query = config["kv_lora_rank"], config["q_lora_rank"]
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    value, experts = config["v_head_dim"], config["n_routed_experts"]
    yield "input_layernorm.weight", (width,)
    yield "post_attention_layernorm.weight", (width,)
    if query is None:
        yield "self_attn.q_proj.weight", (heads * (nope + rope), width)
    else:
        yield "self_attn.q_a_proj.weight", (query, width)
        yield "self_attn.q_a_layernorm.weight", (query,)
        yield "self_attn.q_b_proj.weight", (heads * (nope + rope), query)
    yield "self_attn.kv_a_proj_with_mqa.weight", (rank + rope, width)
    yield "self_attn.kv_a_layernorm.weight", (rank,)
    yield "self_attn.kv_b_proj.weight", (heads * (nope + value), rank)
    yield "self_attn.o_proj.weight", (width, heads * value)
    if layer < config["first_k_dense_replace"]:
        yield from _mlp("mlp", width, config["intermediate_size"])
        return
    yield "mlp.gate.weight", (experts, width)
    if config["topk_method"] == "noaux_tc":
        yield "mlp.gate.e_score_correction_bias", (experts,)
    inner = config["moe_intermediate_size"]
    for expert in range(experts):
        yield from _mlp(f"mlp.experts.{expert}", width, inner)
    yield from _mlp("mlp.shared_experts", width, inner * config["n_shared_experts"])


def _mlp(prefix: str, width: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.gate_proj.weight", (inner, width)
    yield f"{prefix}.up_proj.weight", (inner, width)
    yield f"{prefix}.down_proj.weight", (width, inner)


def _stored(name: str, shape: tuple[int, ...], dtype: str) -> Iterator[Tensor]:
    if name.endswith("e_score_correction_bias"):
        yield name, "F32", shape
    elif len(shape) == 1 or name.endswith("mlp.gate.weight"):
        yield name, "BF16", shape
    else:
        yield name, dtype, shape
        if dtype == "F8_E4M3":
            yield f"{name}_scale_inv", "F32", tuple(-(-size // 128) for size in shape)


def _bytes(tensor: Tensor) -> int:
    return prod(tensor[2]) * _SIZES[tensor[1]]


def _shards(tensors: Iterator[Tensor]) -> Iterator[list[Tensor]]:
    shard: list[Tensor] = []
    for tensor in tensors:
        if shard and sum(map(_bytes, shard)) + _bytes(tensor) > _SHARD_BYTES:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def _write_shard(path: Path, tensors: list[Tensor]) -> None:
    """Wide dtypes first, as the safetensors library writes them."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in sorted(tensors, key=lambda t: (-_SIZES[t[1]], t[0])):
        start, end = end, end + prod(shape) * _SIZES[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


if __name__ == "__main__":
    write_sparse(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3])
