"""What a raised foreign graph tells of its model, as a checkpoint's config does."""

from __future__ import annotations

import hashlib
from typing import Any

from mla_deploy.config import MlaConfig
from mla_deploy.foreign.graph import ForeignGraph
from mla_deploy.foreign.recognise import Recognition
from mla_deploy.layer_facts import LayerFacts
from mla_deploy.strict_json import canonical_json

MODEL_TYPE = "onnx"  # stands where a checkpoint has its model_type
_UNBOUNDED = (1 << 31) - 1


def foreign_facts(recognition: Recognition) -> MlaConfig:
    """One layer for each attention, with the widths found. Raises: InputError CFG-RANGE, CFG-ROPE.

    `max_position_embeddings` is the length of its tables of positions, or 2^31 - 1 without any.
    Asked before the graph is raised.
    """
    graph = recognition.graph
    vocab = (graph.axes(graph.logits) or (0,))[-1]
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
        for latent in (layer.latent for layer in recognition.layers)
        if latent is not None
    )
    widest = max(layers, key=lambda layer: layer.row_width)
    fields: dict[str, Any] = {
        "model_type": MODEL_TYPE,
        "architecture": "ONNX",
        "hidden_size": _embedding_width(graph),
        "num_layers": len(layers),
        "num_heads": max(layer.heads for layer in layers),
        "kv_lora_rank": widest.rank,
        "qk_nope_head_dim": widest.nope,
        "qk_rope_head_dim": widest.rope,
        "v_head_dim": widest.value,
        "vocab_size": int(vocab),
        "max_position_embeddings": graph.most_tokens or _UNBOUNDED,
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


def _embedding_width(graph: ForeignGraph) -> int:
    for node, _ in graph.ids.uses():
        axes = graph.axes(node.outputs[0])
        if node.op_type == "Gather" and axes is not None and isinstance(axes[-1], int):
            return axes[-1]
    return 1
