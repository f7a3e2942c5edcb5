"""What a raised foreign graph tells of its model, as a checkpoint's config does."""

from __future__ import annotations

from mla_deploy.config import MlaConfig
from mla_deploy.foreign.graph import ForeignGraph
from mla_deploy.foreign.recognise import Recognition
from mla_deploy.found_config import found_config

MODEL_TYPE = "onnx"  # stands where a checkpoint has its model_type


def foreign_facts(recognition: Recognition) -> MlaConfig:
    """One layer for each attention, with the widths found. Raises: InputError CFG-RANGE, CFG-ROPE.

    `max_position_embeddings` is the length of its tables of positions, or 2^31 - 1 without any.
    Asked before the graph is raised.
    """
    graph = recognition.graph
    vocab = (graph.axes(graph.logits) or (0,))[-1]
    found = [layer.latent for layer in recognition.layers if layer.latent is not None]
    return found_config(
        (MODEL_TYPE, "ONNX"),
        found,
        hidden_size=_embedding_width(graph),
        vocab_size=int(vocab),
        longest=graph.most_tokens,
    )


def _embedding_width(graph: ForeignGraph) -> int:
    for node, _ in graph.ids.uses():
        axes = graph.axes(node.outputs[0])
        if node.op_type == "Gather" and axes is not None and isinstance(axes[-1], int):
            return axes[-1]
    return 1
