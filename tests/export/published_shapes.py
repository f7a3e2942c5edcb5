"""Checkpoints in the shape of published models, of one layer or more: what engines are measured on.

Attention and the dense MLP have their published sizes (V3's MLP is cut); the vocabulary is small.
Weights are noise, a block of it over and over: a builder looks at shapes and dtypes only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny import tiny_config

_DEEPSEEK = {
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "kv_lora_rank": 512,
}

# name -> (family, sizes)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "v2-lite": ("deepseek_v2", {
        **_DEEPSEEK, "hidden_size": 2048, "num_attention_heads": 16, "q_lora_rank": None,
        "intermediate_size": 10944, "first_k_dense_replace": 1}),
    "v3": ("deepseek_v3", {
        **_DEEPSEEK, "hidden_size": 7168, "num_attention_heads": 128, "q_lora_rank": 1536,
        "intermediate_size": 2048, "first_k_dense_replace": 1}),
    "minicpm3": ("minicpm3", {
        "hidden_size": 2560, "num_attention_heads": 40, "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32, "v_head_dim": 64, "kv_lora_rank": 256, "q_lora_rank": 768,
        "intermediate_size": 6400, "dim_model_base": 256}),
    "glm-4.7-flash": ("glm4_moe_lite", {
        "hidden_size": 2048, "num_attention_heads": 20, "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64, "v_head_dim": 256, "kv_lora_rank": 512, "q_lora_rank": 768,
        "intermediate_size": 10240, "mlp_layer_types": ["dense"]}),
    "youtu": ("youtu", {
        **_DEEPSEEK, "hidden_size": 2048, "num_attention_heads": 16, "q_lora_rank": 1536,
        "intermediate_size": 6144}),
}  # fmt: skip

_BLOCK = 1_000_003  # a prime: no row or column of a weight is another's


def write_shape(folder: Path, name: str, layers: int = 1) -> Path:
    """Write the checkpoint `name` of SHAPES in fp16 into `folder`, which is created; returns it."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    family, sizes = SHAPES[name]
    config = tiny_config(
        family, num_hidden_layers=layers, vocab_size=512, max_position_embeddings=40960, **sizes
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    generator = torch.Generator().manual_seed(0)
    noise = (0.02 * torch.randn(_BLOCK, generator=generator)).half()
    tensors = {
        key: noise.repeat(-(-value.numel() // _BLOCK))[: value.numel()].view(value.shape)
        for key, value in model.state_dict().items()
        if key not in tied
    }
    folder.mkdir(parents=True)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
