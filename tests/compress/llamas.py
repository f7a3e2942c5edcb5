"""Small models with ordinary attention, random, and the tokenizer of the trained tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

TINY = Path(__file__).parents[2] / "models" / "tiny-deepseek-v3"

SIZES: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


def write_llama(
    folder: Path,
    name: str = "Llama",
    *,
    tokenizer: bool = True,
    seed: int = 0,
    last_layer: float = 1.0,
    **fields: Any,
) -> Path:
    """A checkpoint of transformers' class `name` at `folder`, written as its users do.

    `last_layer`: how much its attention adds; near zero, nothing is lost by a cut there.
    """
    torch.manual_seed(seed)
    given = {**SIZES, **fields}
    if name in ("Qwen2", "Phi3", "Granite", "SmolLM3", "StableLm", "Olmo", "Mixtral", "DiffLlama"):
        given.pop("head_dim")
        given["hidden_size"] = 96
    if name == "Phi3":
        given["pad_token_id"] = 0
    config = getattr(transformers, f"{name}Config")(**given)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Wide enough that attention is not flat; norms and biases are no longer trivial.
            scale = 0.5 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5 * 1.5
            parameter.add_(torch.randn_like(parameter) * scale)
        if last_layer != 1.0:
            model.model.layers[-1].self_attn.o_proj.weight.mul_(last_layer)
    model.save_pretrained(folder)
    if tokenizer:
        shutil.copy(TINY / "tokenizer.json", folder / "tokenizer.json")
    return folder


def fields_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found
