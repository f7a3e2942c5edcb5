"""A raised module as the source of a bundle: its facts as an MlaConfig, its weights, its digest."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any

from mla_deploy.config import MlaConfig
from mla_deploy.layer_facts import LayerFacts
from mla_deploy.source.user.factory import UserModule, open_module
from mla_deploy.source.user.graph import ATEN
from mla_deploy.source.user.raised import RaisedModule, raise_module
from mla_deploy.strict_json import canonical_json

MODULE_TYPE = "module"  # stands where a checkpoint has its model_type
_UNBOUNDED = (1 << 31) - 1


@dataclass(frozen=True)
class ModuleSource:
    """What a raised module is as the source of a bundle: as a checkpoint tells of itself."""

    raised: RaisedModule
    config: MlaConfig
    notes: tuple[str, ...] = ()

    @property
    def user(self) -> UserModule:
        return self.raised.source

    @property
    def digest(self) -> str:
        return self.user.digest

    @property
    def files(self) -> tuple[str, ...]:
        return self.user.files

    @property
    def total_bytes(self) -> int:
        return self.user.total_bytes


def open_module_source(name: str, weights: str | os.PathLike[str] | None) -> ModuleSource:
    """The module that a factory makes, raised. Raises as `open_module` and `raise_module`."""
    raised = raise_module(open_module(name, weights))
    return ModuleSource(raised, module_config(raised))


def module_config(raised: RaisedModule) -> MlaConfig:
    """One layer for each attention, with the widths found. Raises: InputError CFG-RANGE, CFG-ROPE.

    `max_position_embeddings` is the longest sequence that the module takes, or 2^31 - 1.
    """
    layers = tuple(
        LayerFacts(
            kind="",
            heads=latent.heads,
            query_rank=None,
            rank=len(latent.latent),
            nope=latent.nope,
            rope=latent.rope,
            value=latent.value,
        )
        for latent in raised.latents
    )
    widest = max(layers, key=lambda layer: layer.row_width)
    fields: dict[str, Any] = {
        "model_type": MODULE_TYPE,
        "architecture": type(raised.source.module).__qualname__,
        "hidden_size": _hidden_size(raised),
        "num_layers": len(layers),
        "num_heads": max(layer.heads for layer in layers),
        "kv_lora_rank": widest.rank,
        "qk_nope_head_dim": widest.nope,
        "qk_rope_head_dim": widest.rope,
        "v_head_dim": widest.value,
        "vocab_size": raised.vocab_size,
        "max_position_embeddings": raised.graph.most_tokens or _UNBOUNDED,
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


def _hidden_size(raised: RaisedModule) -> int:
    """Width of the embedding; 1 where the tokens are not embedded by one."""
    for node in raised.graph.ids.users:
        if node.target is ATEN.embedding.default:
            width = raised.graph.axes(node)[-1]
            return width if isinstance(width, int) else 1
    return 1
