"""How many cached rows a token's attention reads in a layer."""

from __future__ import annotations

from mla_deploy.config import MlaConfig
from mla_deploy.layer_facts import INDEXED, SLIDING, LayerFacts


def seen_rows(config: MlaConfig, layer: LayerFacts, context: int, *, chosen: bool = True) -> int:
    """Of `context` tokens: all, those of the window, or (`chosen`) those an indexer picks."""
    fields = config.raw
    if layer.kind == SLIDING:
        return min(context, int(fields.get("sliding_window") or fields["sliding_window_size"]))
    if layer.kind == INDEXED and chosen and fields.get("index_topk"):
        return min(context, int(fields["index_topk"]))
    return context
