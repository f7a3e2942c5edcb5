"""Which attentions of a foreign graph are MLA, and where the recognition of the others stopped."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from mla_deploy.foreign.attention import Site, attention_nodes, attention_site
from mla_deploy.foreign.causal import behind_guard, require_causal
from mla_deploy.foreign.graph import ForeignGraph, foreign_graph
from mla_deploy.foreign.latent import Latent, latent_of
from mla_deploy.foreign.region import Region
from mla_deploy.foreign.stop import Stop, shown


@dataclass(frozen=True)
class LayerFinding:
    """One attention of the graph: what it was recognised as, or where that stopped.

    `node` names its softmax or operator. `step` is one of `stop.STEPS`, `stopped_at` the first node
    that does not fit, `reason` why; all three are empty where `latent` is there. `site` is there as
    soon as queries, keys and values were found.
    """

    index: int
    node: str
    site: Site | None
    latent: Latent | None
    step: str = ""
    stopped_at: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Recognition:
    """A foreign graph, and its attentions in order."""

    graph: ForeignGraph
    layers: tuple[LayerFinding, ...]

    @property
    def is_mla(self) -> bool:
        """Whether there is an attention, and each one is MLA."""
        return bool(self.layers) and all(layer.latent is not None for layer in self.layers)


def recognise(model: ir.Model) -> Recognition:
    """Every attention of a graph without functions; nothing is changed or written.

    Weights are read a layer at a time. Raises: InputError REW-INPUT, REW-FIXED.
    """
    graph = foreign_graph(model)
    region = Region(graph)
    nodes = attention_nodes(graph)
    return Recognition(graph, tuple(_layer(region, n, i) for i, n in enumerate(nodes)))


def _layer(region: Region, node: ir.Node, index: int) -> LayerFinding:
    name, site = shown(node), None
    try:
        site = attention_site(region.graph, node, index)
        require_causal(region, site)
        site = behind_guard(region, site)
        return LayerFinding(index, name, site, latent_of(region, site))
    except Stop as stop:
        return LayerFinding(index, name, site, None, stop.step, stop.node, stop.reason)
