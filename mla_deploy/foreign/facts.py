"""What a raised foreign graph tells of its model, as a checkpoint's config does."""

from __future__ import annotations

import hashlib
from typing import Any

from mla_deploy.config import MlaConfig
from mla_deploy.foreign.trunk import RaisedForeign
from mla_deploy.layer_facts import LayerFacts
from mla_deploy.strict_json import canonical_json

MODEL_TYPE = "onnx"  # stands where a checkpoint has its model_type
_UNBOUNDED = (1 << 31) - 1


def foreign_config(raised: RaisedForeign) -> MlaConfig:
    """One layer for each attention, with the widths found. Raises: InputError CFG-RANGE, CFG-ROPE.

    A graph does not say how many positions it was made for: `max_position_embeddings` is 2^31 - 1.
    """
    layers = tuple(
        LayerFacts(
            kind="",
            heads=latent.heads,
            query_rank=None,
            rank=latent.rank,
            nope=latent.nope,
            rope=latent.rope,
            value=latent.value,
        )
        for latent in raised.latents
    )
    widest = max(layers, key=lambda layer: layer.row_width)
    fields: dict[str, Any] = {
        "model_type": MODEL_TYPE,
        "architecture": "ONNX",
        "hidden_size": raised.hidden_size,
        "num_layers": len(layers),
        "num_heads": max(layer.heads for layer in layers),
        "kv_lora_rank": widest.rank,
        "qk_nope_head_dim": widest.nope,
        "qk_rope_head_dim": widest.rope,
        "v_head_dim": widest.value,
        "vocab_size": raised.vocab_size,
        "max_position_embeddings": _UNBOUNDED,
    }
    widths = [[layer.heads, layer.rank, layer.nope, layer.rope, layer.value] for layer in layers]
    digest = hashlib.sha256(canonical_json({**fields, "layers": widths})).hexdigest()
    return MlaConfig(
        **fields,
        q_lora_rank=None,
        rope_type="default",
        rope_original_length=None,
        rope_factor=1.0,
        num_experts=0,
        experts_per_token=0,
        tie_word_embeddings=False,
        eos_token_ids=(),
        bos_token_id=None,
        raw=fields,
        digest=digest,
        layers=layers,
    )
