"""What other attentions would cache for the same tokens.

    full heads    the same model with keys and values of every head: H (N + R + V) a token and layer
    GQA           a model of its layers and width with 8 key-value heads of 128: 2 x 8 x 128
                  (of the model's own value width, where it is narrower than all of that)

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
    elements: Callable[[MlaConfig, LayerFacts], int]
    score_widths: Callable[[MlaConfig, LayerFacts], int]

    def cache_bytes(self, config: MlaConfig, *, batch: int, capacity: int, itemsize: int) -> int:
        """Bytes of the cache of `capacity` tokens a row."""
        states = sum(c.bytes(capacity, itemsize) for c in cache_plan(config) if c.rows == 0)
        rows = sum(
            self.elements(config, layer) * seen_rows(config, layer, capacity, chosen=False)
            for layer in config.layers
            if layer.kind != LINEAR
        )
        return batch * (states + config.attentions_per_layer * rows * itemsize)


def _full_widths(_: MlaConfig, layer: LayerFacts) -> int:
    return layer.nope + layer.rope + layer.value


def _full_elements(config: MlaConfig, layer: LayerFacts) -> int:
    return layer.heads * _full_widths(config, layer)


def _gqa_widths(config: MlaConfig, layer: LayerFacts) -> int:
    return 2 * (GQA_WIDTH if config.hidden_size >= GQA_HEADS * GQA_WIDTH else layer.value)


def _gqa_elements(config: MlaConfig, layer: LayerFacts) -> int:
    return min(GQA_HEADS, layer.heads) * _gqa_widths(config, layer)


FULL_HEADS = Rival("full heads", _full_elements, _full_widths)
GQA = Rival("GQA", _gqa_elements, _gqa_widths)
RIVALS: Mapping[str, Rival] = {"full_heads": FULL_HEADS, "gqa": GQA}
