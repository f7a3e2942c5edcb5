"""What other attentions would cache for the same tokens.

    full heads    the same model with keys and values of every head: H (N + R + V) a token and layer
    GQA           a model of its layers and width with 8 key-value heads of 128: 2 x 8 x 128

Layers that keep no rows (delta attention) keep their states in either; sliding ones their window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mla_deploy.cache_plan import cache_plan
from mla_deploy.config import MlaConfig
from mla_deploy.layer_facts import LINEAR, LayerFacts
from mla_deploy.plan.rows import seen_rows

GQA_HEADS, GQA_WIDTH = 8, 128


@dataclass(frozen=True)
class Rival:
    """`elements`: of one cached row of a layer; `score_widths`: multiply-adds a head and row."""

    name: str
    elements: Callable[[LayerFacts], int]
    score_widths: Callable[[LayerFacts], int]

    def cache_bytes(self, config: MlaConfig, *, batch: int, capacity: int, itemsize: int) -> int:
        """Bytes of the cache of `capacity` tokens a row."""
        states = sum(c.bytes(capacity, itemsize) for c in cache_plan(config) if c.rows == 0)
        rows = sum(
            self.elements(layer) * seen_rows(config, layer, capacity, chosen=False)
            for layer in config.layers
            if layer.kind != LINEAR
        )
        return batch * (states + config.attentions_per_layer * rows * itemsize)


def _full_elements(layer: LayerFacts) -> int:
    return layer.heads * (layer.nope + layer.rope + layer.value)


def _gqa_elements(layer: LayerFacts) -> int:
    return 2 * min(GQA_HEADS, layer.heads) * GQA_WIDTH


FULL_HEADS = Rival("full heads", _full_elements, lambda layer: _full_elements(layer) // layer.heads)
GQA = Rival("GQA", _gqa_elements, lambda _: 2 * GQA_WIDTH)
RIVALS: Mapping[str, Rival] = {"full_heads": FULL_HEADS, "gqa": GQA}
