"""The model's sizes as a table: axis letter, glossary word, number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mla_deploy.cli.output import Sheet

_AXES = (
    ("", "layers", "num_layers"),
    ("D", "model width", "hidden_size"),
    ("H", "heads", "num_heads"),
    ("N", "no-position head width", "qk_nope_head_dim"),
    ("R", "rope width", "qk_rope_head_dim"),
    ("V", "value width", "v_head_dim"),
    ("L", "latent rank", "kv_lora_rank"),
    ("Q", "query rank", "q_lora_rank"),
    ("", "vocabulary", "vocab_size"),
    ("", "longest position", "max_position_embeddings"),
    ("", "experts", "num_experts"),
    ("", "experts a token uses", "experts_per_token"),
)

MODEL_FIELDS = (
    "model_type",
    "architecture",
    "rope_type",
    "rope_original_length",
    *(field for _, _, field in _AXES),
)


def model_sheet(model: Mapping[str, Any]) -> Sheet:
    """Sizes that are absent or zero (no query rank, no experts) have no line."""
    rows = [
        (letter, word, f"{model[field]:,}")
        for letter, word, field in _AXES
        if model.get(field) not in (None, 0)
    ]
    rope = str(model["rope_type"])
    if model.get("rope_original_length"):
        rope = f"{rope}, trained to {model['rope_original_length']:,} before scaling"
    named = model["architecture"] or model["model_type"]  # config.json need not name its class
    return Sheet(f"{named} (rope: {rope})", ("axis", "what", "#size"), rows)
