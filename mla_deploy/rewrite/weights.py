"""Weights of a layer graph: every free value and every split half becomes a graph input.

Rules name the weight they need; here the graph learns of it. What a name stands for in the
checkpoint (the whole tensor, one half of it, one part of it quantised) is a `WeightUse`, resolved
when bytes are written.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from mla_deploy.rewrite.quantized_weight import lifted_parts
from mla_deploy.rewrite.rule import DOMAIN, required
from mla_deploy.weight_forms.parts import Part

HALVES = ("w_uk_HNL", "w_uv_HLV")


@dataclass(frozen=True)
class WeightUse:
    """A weight input: `parameter` of the module, whole or one absorbed half of [H*(N+V), L], in
    float or as one `part` of it quantised."""

    parameter: str
    half: str | None = None  # None, or one of HALVES
    heads: int = 0
    nope: int = 0
    value: int = 0
    part: Part | None = None


def collect_weights(model: ir.Model, given: set[str]) -> dict[str, WeightUse]:
    """Turn SplitHeads outputs and free values into inputs; the uses by input name, in order.

    `given` are the inputs that are not weights. Inputs no node reads any more are dropped.
    """
    uses: dict[str, WeightUse] = {}
    for node in list(model.graph):
        if node.op_type == "SplitHeads" and node.domain == DOMAIN:
            uses.update(_lift_halves(model.graph, node))
    for weight, value, part in lifted_parts(model.graph):
        whole = uses.get(str(weight.name), WeightUse(str(weight.name)))
        uses[str(value.name)] = replace(whole, part=part)
    for value in _free_values(model.graph):
        model.graph.inputs.append(value)
    for value in list(model.graph.inputs):
        name = str(value.name)
        if name in given:
            continue
        if value.uses():
            uses.setdefault(name, WeightUse(parameter=name))
        else:
            uses.pop(name, None)
            model.graph.inputs.remove(value)
    return {str(v.name): uses[str(v.name)] for v in model.graph.inputs if v.name in uses}


def _lift_halves(graph: ir.Graph, node: ir.Node) -> dict[str, WeightUse]:
    source = required(node.inputs[0])
    heads, nope, value = (int(node.attributes[k].value) for k in ("heads", "nope", "value"))
    rank = source.shape[1] if source.shape is not None else None
    shapes = ((heads, nope, rank), (heads, rank, value))
    uses: dict[str, WeightUse] = {}
    for half, shape, output in zip(HALVES, shapes, node.outputs, strict=True):
        name = f"{str(source.name).removesuffix('.weight')}.{half}"
        lifted = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        output.replace_all_uses_with(lifted)
        graph.inputs.append(lifted)
        uses[name] = WeightUse(str(source.name), half, heads, nope, value)
    graph.remove(node, safe=True)
    return uses


def _free_values(graph: ir.Graph) -> list[ir.Value]:
    """Values that nodes read, in subgraphs too, and that nothing in `graph` defines."""
    defined = set(graph.inputs) | set(graph.initializers.values())
    for node in ir.traversal.RecursiveGraphIterator(graph):
        defined.update(node.outputs)
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                defined.update(attribute.as_graph().inputs)
    free: dict[ir.Value, None] = {}
    for node in ir.traversal.RecursiveGraphIterator(graph):
        for value in node.inputs:
            if value is not None and value not in defined:
                free[value] = None
    return list(free)
