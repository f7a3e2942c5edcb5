"""The work of one layer, counted in a graph: its nodes, and multiply-adds of a step.

A layer reaches from the latent of the layer before it to its own latent, which is the same place in
every form: what lies between is all that one layer does, once. Shapes at a context are computed
node by node (`sizes.py`), so nothing here depends on how a graph was made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir

from mla_deploy.foreign.graph import ForeignGraph, Sizes
from mla_deploy.foreign.sizes import Shape, known_values

_UNCOUNTED = {"Constant", "Identity"}
_PRODUCTS = {"MatMul", "FusedMatMul", "MatMulNBits", "MatMulInteger", "FusedMatMulActivation"}
_SHOWN_OPERATORS = 6


@dataclass(frozen=True)
class LayerWork:
    """`growing`: those of the multiply-adds that come with the cached tokens. Both are None where
    the shapes of some product cannot be told."""

    nodes: int
    operators: tuple[tuple[str, int], ...]  # the most frequent
    multiply_adds: int | None
    growing: int | None


def foreign_work(
    graph: ForeignGraph, ends: Sequence[Sequence[ir.Value]], context: int
) -> LayerWork:
    """Of the last layer, for the token that makes `context` tokens. `ends`: each layer's latent.

    A graph without a cache computes all tokens for it.
    """
    region = _between(ends)

    def shapes(tokens: int) -> Mapping[ir.Value, Shape | None]:
        sizes = Sizes(1, 1, tokens - 1) if graph.caches else Sizes(1, tokens, 0)
        return {value: graph.shape(value, sizes) for node in region for value in _values(node)}

    return _work(region, shapes(context), shapes(2))


def bundle_work(model: ir.Model, context: int) -> LayerWork:
    """The same of a bundle's decode graph, at a capacity of `context`."""
    outs = [v for v in model.graph.outputs if str(v.name).startswith("latent_cache_out.")]
    if not outs:
        outs = [v for v in model.graph.outputs if str(v.name).startswith("latent_out.")]
    region = _between([[value] for value in outs])

    def shapes(tokens: int) -> Mapping[ir.Value, Shape | None]:
        sizes: dict[ir.Value, Shape] = {}
        given: dict[ir.Value, np.ndarray] = {}
        for value in model.graph.inputs:
            name = str(value.name)
            words = {"capacity": tokens, "past_tokens": tokens - 1}
            dims = value.shape.dims if value.shape is not None else ()
            sizes[value] = tuple(
                size if isinstance(size, int) else words.get(str(size.value), 1) for size in dims
            )
            if name in ("cache_lengths", "new_lengths"):
                number = tokens - 1 if name == "cache_lengths" else 1
                given[value] = np.array([number], np.int64)
        known = known_values(model, sizes, given)
        return {value: known.shapes.get(value) for node in region for value in _values(node)}

    return _work(region, shapes(context), shapes(2))


def _work(
    region: Sequence[ir.Node],
    far: Mapping[ir.Value, Shape | None],
    near: Mapping[ir.Value, Shape | None],
) -> LayerWork:
    counts = Counter(node.op_type for node in region if node.op_type not in _UNCOUNTED)
    total = _sum([multiply_adds(node, far) for node in region])
    least = _sum([multiply_adds(node, near) for node in region])
    growing = None if total is None or least is None else total - least
    return LayerWork(counts.total(), tuple(counts.most_common(_SHOWN_OPERATORS)), total, growing)


def _sum(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def multiply_adds(node: ir.Node, shapes: Mapping[ir.Value, Shape | None]) -> int | None:
    """Of one node; 0 of what multiplies no matrices, None where its shapes cannot be told."""
    if node.op_type not in (*_PRODUCTS, "Gemm", "Einsum", "Attention"):
        return 0
    out = shapes.get(node.outputs[0])
    given = [shapes.get(value) if value is not None else None for value in node.inputs]
    if out is None or given[0] is None:
        return None
    first = given[0]
    if node.op_type in _PRODUCTS:
        return prod(out) * first[-2 if node.attributes.get_int("transA", 0) else -1]
    if node.op_type == "Gemm":
        return prod(out) * first[0 if node.attributes.get_int("transA", 0) else 1]
    if node.op_type == "Einsum":
        return _einsum(node, given)
    return None if node.domain else _attention(node, given)


def _einsum(node: ir.Node, given: Sequence[Shape | None]) -> int | None:
    parts = node.attributes.get_string("equation", "").replace(" ", "").partition("->")[0]
    sizes: dict[str, int] = {}
    for letters, shape in zip(parts.split(","), given, strict=False):
        if shape is None or len(letters) != len(shape):
            return None
        sizes.update(zip(letters, shape, strict=True))
    return prod(sizes.values())


def _attention(node: ir.Node, given: Sequence[Shape | None]) -> int | None:
    """Scores and the weighted sum, over past and new tokens."""
    query, key, value = given[:3]
    if query is None or key is None or value is None:
        return None
    past = given[4] if len(given) > 4 else None
    tokens = key[-2] + (past[-2] if past is not None else 0)
    if len(query) == 4:
        return prod(query[:3]) * tokens * (query[3] + value[3])
    heads = node.attributes.get_int("q_num_heads", 1)
    groups = node.attributes.get_int("kv_num_heads", heads)
    return prod(query[:2]) * tokens * (query[2] + value[2] * heads // groups)


def _between(ends: Sequence[Sequence[ir.Value]]) -> list[ir.Node]:
    """What the last layer's latent needs and the one before it does not; all, of a single layer."""
    last = _needed(ends[-1])
    before = _needed(ends[-2]) if len(ends) > 1 else set()
    return [node for node in last if node not in before]


def _needed(values: Sequence[ir.Value]) -> dict[ir.Node, None]:
    found: dict[ir.Node, None] = {}
    waiting = [value.producer() for value in values]
    while waiting:
        node = waiting.pop()
        if node is None or node in found:
            continue
        found[node] = None
        waiting.extend(value.producer() for value in node.inputs if value is not None)
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                for inner in ir.traversal.RecursiveGraphIterator(attribute.as_graph()):
                    waiting.extend(v.producer() for v in inner.inputs if v is not None)
    return found


def _values(node: ir.Node) -> list[ir.Value]:
    return [value for value in (*node.inputs, *node.outputs) if value is not None]
