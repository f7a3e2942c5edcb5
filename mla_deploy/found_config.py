"""A config for a model that brings none: what was found of its attentions, as an MlaConfig."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Protocol

from mla_deploy.config import MlaConfig
from mla_deploy.layer_facts import LayerFacts
from mla_deploy.strict_json import canonical_json

_UNBOUNDED = (1 << 31) - 1


class FoundLatent(Protocol):
    """One attention: H heads, widths N, R and V, and the rank L of its latent."""

    @property
    def heads(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def nope(self) -> int: ...
    @property
    def rope(self) -> int: ...
    @property
    def value(self) -> int: ...


def found_config(
    names: tuple[str, str],
    latents: Iterable[FoundLatent],
    *,
    hidden_size: int,
    vocab_size: int,
    longest: int | None,
) -> MlaConfig:
    """One layer for each attention, with its widths.

    `names`: what stands for the model_type, and for the architecture. `longest`: the longest row
    that the model takes, None for any length (2^31 - 1 then).
    Raises: InputError CFG-RANGE, CFG-ROPE.
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
        for latent in latents
    )
    widest = max(layers, key=lambda layer: layer.row_width)
    fields: dict[str, Any] = {
        "model_type": names[0],
        "architecture": names[1],
        "hidden_size": hidden_size,
        "num_layers": len(layers),
        "num_heads": max(layer.heads for layer in layers),
        "kv_lora_rank": widest.rank,
        "qk_nope_head_dim": widest.nope,
        "qk_rope_head_dim": widest.rope,
        "v_head_dim": widest.value,
        "vocab_size": vocab_size,
        "max_position_embeddings": longest or _UNBOUNDED,
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
