"""Known faults of exporters, found in a foreign graph: each with its node and what to do.

A fault is what makes answers wrong, memory large or steps slow; the graph may be valid ONNX all the
same. `is_certain` is False where only signs of it can be seen, because a config would have to tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isclose, prod

import numpy as np
import onnx_ir as ir

from mla_deploy.config import MlaConfig
from mla_deploy.foreign.latent import Latent
from mla_deploy.foreign.recognise import LayerFinding, Recognition
from mla_deploy.foreign.rope_signs import rope_signs
from mla_deploy.foreign.softmax_scale import scale_in_graph, scale_of_config
from mla_deploy.foreign.stop import shown

REWRITE = "rewrite the graph with `mla-deploy rewrite`"
# Scales are compared as halves hold them.
_SCALE_ERROR = 2e-3


@dataclass(frozen=True)
class GraphFault:
    """`check` names the kind, `where` the node or value; one for all layers that are alike."""

    check: str
    where: str
    found: str
    wanted: str
    fix: str
    is_certain: bool = True
    layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Suspect:
    """What is looked at: a recognised graph, and the config of its model where there is one."""

    recognition: Recognition
    config: MlaConfig | None = None

    def latents(self) -> Iterator[tuple[LayerFinding, Latent]]:
        """The layers that are MLA."""
        for layer in self.recognition.layers:
            if layer.latent is not None and layer.site is not None:
                yield layer, layer.latent

    def cached_elements(self) -> int:
        """Numbers that all caches together hold for a token."""
        graph = self.recognition.graph
        return sum(
            prod(axis for axis in graph.axes(cache) or () if isinstance(axis, int))
            for cache in graph.caches
        )


def graph_faults(suspect: Suspect) -> tuple[GraphFault, ...]:
    """Every known fault, in the order of `CHECKS`."""
    return tuple(fault for check in CHECKS for fault in check(suspect))


def scale_without_mscale(suspect: Suspect) -> Iterator[GraphFault]:
    """The softmax scale is 1/sqrt(E) where YaRN asks for its mscale squared as well."""
    graph, wrong, wanted = suspect.recognition.graph, [], ""
    for layer, latent in suspect.latents():
        site = layer.site
        if site is None:
            continue
        found, plain = scale_in_graph(graph, site), (latent.nope + latent.rope) ** -0.5
        if suspect.config is not None:
            asked = scale_of_config(suspect.config)
            if not isclose(found, asked, rel_tol=_SCALE_ERROR):
                wanted = f"{asked:.6g}, as the config's rotary settings ask"
                wrong.append((layer, found))
        elif isclose(found, plain, rel_tol=_SCALE_ERROR):
            signs = rope_signs(graph, latent.rope)
            # A factor above 1 is YaRN without mscale_all_dim, or longrope: their scale is plain.
            if signs is not None and signs.is_extended and signs.factor <= 1 + 1e-6:
                wanted = (
                    f"more than 1/sqrt({latent.nope + latent.rope}): the frequencies in "
                    f"{signs.where!r} are those of an extended context"
                )
                wrong.append((layer, found))
    if wrong:
        yield GraphFault(
            "scale-without-mscale",
            wrong[0][0].node,
            f"the softmax scale is {wrong[0][1]:.6g}",
            wanted,
            "export again with a version that multiplies the scale by mscale_all_dim squared; "
            "the answers of this graph are those of another model",
            suspect.config is not None,
            tuple(layer.index for layer, _ in wrong),
        )


def mask_dropped(suspect: Suspect) -> Iterator[GraphFault]:
    """An attention that sees the future, or that hides what it should see."""
    wrong = [layer for layer in suspect.recognition.layers if layer.step == "mask"]
    if wrong:
        yield GraphFault(
            "mask-dropped",
            wrong[0].stopped_at,
            wrong[0].reason,
            "a causal mask over cached and new tokens",
            "export again with a causal mask; a sample with padding keeps exporters from "
            "leaving it out",
            layers=tuple(layer.index for layer in wrong),
        )


def cache_expanded(suspect: Suspect) -> Iterator[GraphFault]:
    """Keys and values of every head are cached, and could be one latent row."""
    found = list(suspect.latents())
    latent = sum(each.rank + each.rope for _, each in found)
    cached = suspect.cached_elements()
    if found and len(found) == len(suspect.recognition.layers) and cached > latent:
        yield GraphFault(
            "cache-expanded",
            shown(suspect.recognition.graph.caches[0]),
            f"{cached:,} numbers are cached a token",
            f"{latent:,}, latent and rope key ({cached / latent:.1f}x less)",
            REWRITE,
            layers=tuple(layer.index for layer, _ in found),
        )


def value_padded(suspect: Suspect) -> Iterator[GraphFault]:
    """Values have columns that are always zero, to be as wide as keys."""
    padded = []
    for layer, latent in suspect.latents():
        w_HKL = latent.w_kv_b.reshape(latent.heads, latent.nope + latent.value, -1)
        used_V = w_HKL[:, latent.nope :].any(axis=(0, 2))
        if latent.value_bias_HV is not None:
            used_V |= latent.value_bias_HV.any(axis=0)
        wide = int(np.flatnonzero(used_V)[-1]) + 1 if used_V.any() else 0
        if 0 < wide < latent.value:
            padded.append((layer, latent.value, wide))
    if padded:
        layer, found, wide = padded[0]
        value = layer.site.value.value if layer.site is not None else None
        yield GraphFault(
            "value-padded",
            shown(value) if value is not None else layer.node,
            f"values are {found} wide, the last {found - wide} always zero",
            f"{wide} wide",
            f"do not pad values to the width of keys, or {REWRITE}",
            layers=tuple(each.index for each, _, _ in padded),
        )


def history_expanded(suspect: Suspect) -> Iterator[GraphFault]:
    """A latent is cached, and every step makes keys and values of all heads from all of it."""
    graph = suspect.recognition.graph
    slow = []
    for layer, _ in suspect.latents():
        site = layer.site
        keys = max(site.scores, key=lambda s: s.key.width(graph)).key if site is not None else None
        if keys is not None and keys.count(graph) > 1 and _from_latent_cache(suspect, keys.value):
            slow.append((layer, keys.value))
    if slow:
        yield GraphFault(
            "history-expanded",
            shown(slow[0][1]),
            "keys of all heads are made from all cached tokens at each step",
            "the key projection in the query, so that a step reads the latent as it is",
            REWRITE,
            layers=tuple(layer.index for layer, _ in slow),
        )


def no_cache(suspect: Suspect) -> Iterator[GraphFault]:
    """Each call starts anew and gives nothing to go on from."""
    graph = suspect.recognition.graph
    if not graph.caches and len(graph.model.graph.outputs) == 1 and suspect.recognition.layers:
        yield GraphFault(
            "no-cache",
            shown(graph.ids),
            "the graph caches nothing: each new token computes all before it again",
            "a cache as inputs and outputs",
            f"export with past keys and values, or {REWRITE}",
        )


def attention_outputs(suspect: Suspect) -> Iterator[GraphFault]:
    """`Attention` that gives its keys and values too: TensorRT takes one output only."""
    nodes = [
        node
        for node in suspect.recognition.graph.model.graph
        if node.op_type == "Attention"
        and not node.domain
        and any(value.uses() or value.is_graph_output() for value in node.outputs[1:])
    ]
    if nodes:
        yield GraphFault(
            "attention-outputs",
            shown(nodes[0]),
            f"gives {len(nodes[0].outputs)} outputs, and {len(nodes)} such nodes stand here",
            "one: TensorRT refuses an Attention operator with more",
            f"concatenate past and new keys outside of the operator, or {REWRITE}",
        )


CHECKS: tuple[Callable[[Suspect], Iterator[GraphFault]], ...] = (
    scale_without_mscale,
    mask_dropped,
    value_padded,
    cache_expanded,
    history_expanded,
    no_cache,
    attention_outputs,
)


def _from_latent_cache(suspect: Suspect, keys: ir.Value) -> bool:
    """Whether keys of all tokens are made, by a projection, from what is cached."""
    graph = suspect.recognition.graph
    if not graph.caches or not _all_tokens(suspect, keys):
        return False
    waiting, seen = [keys], set()
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if value in seen or node is None:
            continue
        seen.add(value)
        if node.op_type in ("MatMul", "Gemm", "Einsum", "FusedMatMul"):
            if any(v in graph.from_cache and _all_tokens(suspect, v) for v in _given(node)):
                return True
            continue
        waiting.extend(_given(node))
    return False


def _all_tokens(suspect: Suspect, value: ir.Value) -> bool:
    """Whether a value has a row for every token, rows of several batch rows in one axis or not."""
    axes = suspect.recognition.graph.axes(value) or ()
    return "T" in axes or (bool(axes) and axes[0] == "B?")


def _given(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None]
