"""Tiny deterministic checkpoints of real families, written by transformers' own classes.

`write_tiny(folder, family, **overrides)` writes one; `TINY_PRESETS` names the variations that every
stage must survive. Weights are large enough, norm weights and biases random enough, that a wrong
scale, a swapped matrix or a forgotten bias moves the logits. A checkpoint is built once per
process and then copied.
"""

from __future__ import annotations

import functools
import json
import math
import tempfile
from pathlib import Path
from typing import Any

VOCAB_SIZE = 96

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**EXPERTS, "n_shared_experts": 2, "first_k_dense_replace": 1},
    "deepseek_v3": {**EXPERTS, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1},
    "youtu": {},
    "minicpm3": {"dim_model_base": 24},
    "glm4_moe_lite": {**EXPERTS},
}

YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
}
YARN_ALL_DIM: dict[str, Any] = {**YARN, "mscale": 0.707, "mscale_all_dim": 0.9}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.2, 2.0, 3.0, 4.5],
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# name -> (family, overrides of its config)
TINY_PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "v2": ("deepseek_v2", {}),
    "v2-lite": ("deepseek_v2", {"q_lora_rank": None, "rope_parameters": YARN_ALL_DIM}),
    "v2-groups": (
        "deepseek_v2",
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
         "routed_scaling_factor": 2.0},
    ),
    "v2-all-sparse": ("deepseek_v2", {"first_k_dense_replace": 0}),
    "v3": ("deepseek_v3", {}),
    "v3-half-rope": ("deepseek_v3", {"rope_interleave": False}),
    "v3-yarn": ("deepseek_v3", {"rope_parameters": YARN}),
    "v3-yarn-all-dim": ("deepseek_v3", {"rope_parameters": YARN_ALL_DIM}),
    "v3-llama3-rope": ("deepseek_v3", {"rope_parameters": LLAMA3}),
    "v3-no-query-rank": ("deepseek_v3", {"q_lora_rank": None}),
    "v3-wide-value": ("deepseek_v3", {"v_head_dim": 20, "attention_bias": True}),
    "v3-no-renorm": ("deepseek_v3", {"norm_topk_prob": False}),
    "v3-all-dense": ("deepseek_v3", {"first_k_dense_replace": 2}),
    "v3-three-heads": ("deepseek_v3", {"num_attention_heads": 3, "num_hidden_layers": 3}),
    "v3-tied-eps": ("deepseek_v3", {"tie_word_embeddings": True, "rms_norm_eps": 1e-2}),
    "youtu": ("youtu", {}),
    "youtu-bias-five-heads": (
        "youtu",
        {"num_attention_heads": 5, "attention_bias": True, "v_head_dim": 12,
         "rope_interleave": False},
    ),
    "youtu-untied": ("youtu", {"tie_word_embeddings": False, "rms_norm_eps": 1e-2}),
    "minicpm3": ("minicpm3", {}),
    "minicpm3-longrope": ("minicpm3", {"rope_parameters": LONGROPE}),
    "minicpm3-no-query-rank": (
        "minicpm3", {"q_lora_rank": None, "tie_word_embeddings": False, "attention_bias": True}
    ),
    "glm4-lite": ("glm4_moe_lite", {}),
    "glm4-lite-wide": (
        "glm4_moe_lite",
        {"qk_nope_head_dim": 12, "v_head_dim": 16, "num_attention_heads": 5, "hidden_size": 40,
         "num_hidden_layers": 3},
    ),
}  # fmt: skip

_TEXT = (
    "The latent cache keeps one small row for each token, and every head reads it. "
    "A row is written once and never moved; what lies beyond the length is never read. "
)


def write_tiny(
    folder: str | Path,
    family: str = "deepseek_v3",
    *,
    dtype: str = "float32",
    seed: int = 0,
    tokenizer: bool = False,
    max_shard_size: str = "50GB",
    **overrides: Any,
) -> Path:
    """Write a checkpoint of `family` into `folder`, which is created; returns it.

    `overrides` replace fields of the config. `max_shard_size` (such as "40KB") makes several
    files and an index.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    key = json.dumps(overrides, sort_keys=True)
    for name, content in _built(family, dtype, seed, max_shard_size, key).items():
        (target / name).write_bytes(content)
    if tokenizer:
        vocab_size = overrides.get("vocab_size", VOCAB_SIZE)
        (target / "tokenizer.json").write_text(_tokenizer(vocab_size))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
        (target / "tokenizer_config.json").write_text(json.dumps(settings))
    return target


def write_preset(folder: str | Path, name: str, **options: Any) -> Path:
    """Write the preset `name` of `TINY_PRESETS`; `options` as for `write_tiny`."""
    family, overrides = TINY_PRESETS[name]
    return write_tiny(folder, family, **{**overrides, **options})


def tiny_config(family: str, **overrides: Any) -> Any:
    """transformers' config object of a tiny model."""
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    fields = {**SIZES, **_FAMILIES[family], **json.loads(json.dumps(overrides))}
    fields["num_key_value_heads"] = fields["num_attention_heads"]
    if fields["hidden_size"] % fields["num_attention_heads"] and "hidden_size" not in overrides:
        fields["hidden_size"] = 8 * fields["num_attention_heads"]
    return AutoConfig.for_model(family, **fields)


def tiny_model(family: str, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Any:
    """transformers' model with the tiny weights, in eval mode with eager attention."""
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_config(family, **overrides)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    _fill(model, seed)
    model = model.to(getattr(torch, dtype))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()  # as transformers keeps it
    return model.eval()


def _fill(model: Any, seed: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(seed)
    weights = sorted({**dict(model.named_parameters()), **persistent(model)}.items())
    with torch.no_grad():
        for name, weight in weights:
            noise = torch.randn(weight.shape, generator=generator)
            if "layernorm" in name or name.endswith("norm.weight"):
                values = 1 + 0.2 * noise
            elif weight.dim() == 1:  # biases, and the router's correction bias
                values = 0.2 * noise
            elif "embed_tokens" in name:
                values = 0.5 * noise
            else:
                # A gain of about 1.5 keeps deep products alive without saturating softmax.
                values = noise * (1.5 / math.sqrt(weight.shape[-1]))
            weight.copy_(values)


def persistent(model: Any) -> dict[str, Any]:
    """The buffers that a checkpoint holds."""
    names = set(model.state_dict())
    return {name: buffer for name, buffer in model.named_buffers() if name in names}


@functools.lru_cache(maxsize=64)
def _built(
    family: str, dtype: str, seed: int, max_shard_size: str, overrides: str
) -> dict[str, bytes]:
    model = tiny_model(family, dtype=dtype, seed=seed, **json.loads(overrides))
    return saved_files(model, max_shard_size)


def saved_files(model: Any, max_shard_size: str) -> dict[str, bytes]:
    """What `save_pretrained` writes, by name."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


@functools.lru_cache(maxsize=8)
def _tokenizer(vocab_size: int) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT] * 4, trainer)
    return str(tokenizer.to_str())
