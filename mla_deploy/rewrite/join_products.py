"""join: quantised products of one input -> one product, whose result is cut.

    # before:  x --MatMulNBits(gate [N, K])-->      x --MatMulNBits(up [M, K])-->
    # after:   x --MatMulNBits(Concat(gate, up))--> Split [N, M]

For the decode graph: of one token's product a fixed part is waking threads and rounding the input,
and both are then done once (the two of q_a and kv_a at 0.6 of the time, gate and up at 0.9). ONNX
Runtime joins the weights when it folds constants, and keeps only what it packs of them, so the
weight file has each once. Products in branches stay apart: an expert that is not hit is not read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator

import onnx_ir as ir

from mla_deploy.rewrite.quantized_weight import OPERATOR
from mla_deploy.rewrite.rule import DOMAIN, required


class JoinProducts:
    """All products of a graph at once: which share an input is no pattern of fixed size."""

    name = "join_products"

    def apply_to_model(self, model: ir.Model) -> int:
        """How many products were joined with others."""
        groups = list(_groups(model.graph))
        for group in groups:
            _join(model.graph, group)
        return sum(map(len, groups))


def _groups(graph: ir.Graph) -> Iterator[list[ir.Node]]:
    """Products, two or more, that differ in nothing but their weight; in graph order."""
    found: dict[Hashable, list[ir.Node]] = defaultdict(list)
    for node in graph:
        if node.op_type == "MatMulNBits" and all(map(_is_part, node.inputs[1:])):
            same = sorted((name, a.value) for name, a in node.attributes.items() if name != "N")
            found[node.inputs[0], len(node.inputs), tuple(same)].append(node)
    yield from (group for group in found.values() if len(group) > 1)


def _is_part(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    return node is not None and node.op_type == OPERATOR and node.domain == DOMAIN


def _join(graph: ir.Graph, group: list[ir.Node]) -> None:
    """In place of the first; what stands for a weight moves before it."""
    first, rows = group[0], [int(node.attributes["N"].value) for node in group]
    for node in group[1:]:
        stands = required(node.inputs[1]).producer()
        if stands is not None:
            graph.remove(stands)
            graph.insert_before(first, stands)
    joined = [
        ir.node("Concat", parts, attributes={"axis": 0})
        for parts in zip(*(node.inputs[1:] for node in group), strict=True)
    ]
    settings = {name: a.value for name, a in first.attributes.items()}
    product = ir.node(
        first.op_type,
        [first.inputs[0], *(node.outputs[0] for node in joined)],
        attributes={**settings, "N": sum(rows)},
        domain=first.domain,
    )
    sizes = ir.node("Constant", [], attributes={"value_ints": rows})
    cut = ir.node(
        "Split",
        [product.outputs[0], sizes.outputs[0]],
        attributes={"axis": -1},
        num_outputs=len(rows),
    )
    graph.insert_before(first, [*joined, product, sizes, cut])
    for node, made in zip(group, cut.outputs, strict=True):
        old = node.outputs[0]
        made.type, made.shape, made.name = old.type, old.shape, old.name
        old.replace_all_uses_with(made, replace_graph_outputs=True)
        graph.remove(node, safe=True)


RULE = JoinProducts()
