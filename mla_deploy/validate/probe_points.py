"""A graph as a list of named places: its layers written out, every value that depends on the inputs
known by the layer and the node that make it.

    before:  layer.3(hidden, ...)            a call; its nodes have one name for all calls
    after:   3/node_Gemm_68, 3/node_...      nodes of the main graph

Two graphs of one model are then aligned by (layer, node name, which output), whatever was inserted
or taken out between.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as common_passes

Key = tuple[int | None, str, int]  # layer, node, output
_MARK = "/"


@dataclass(frozen=True)
class Point:
    """A value that can be looked at. `value` is its name in the written-out graph."""

    key: Key
    op_type: str
    output: str
    value: str
    is_boundary: bool  # handed on by a layer, or by the nodes before and behind them

    @property
    def layer(self) -> int | None:
        return self.key[0]


class WrittenOut:
    """A model without functions. `points` are in the order of the graph."""

    def __init__(self, model: ir.Model) -> None:
        """Takes `model` over."""
        self.model = model
        boundaries = _name_calls(model)
        common_passes.InlinePass()(model)
        self._makers: dict[str, ir.Node] = {}
        self.points = tuple(self._points(boundaries))
        self._by_key = {point.key: point for point in self.points}

    def aligned(self, other: WrittenOut) -> dict[Point, Point]:
        """The place in `other` of each that has one: by names, and what layers hand on by its turn.

        Two releases name their nodes otherwise, but their layers hand on the same values.
        """
        turns = other._turns()
        found: dict[Point, Point] = {}
        for point in self.points:
            match = other._by_key.get(point.key)
            if match is not None and match.op_type == point.op_type:
                found[point] = match
        if 2 * len(found) < len(self.points):
            found |= {p: turns[turn] for turn, p in self._turns().items() if turn in turns}
        return found

    def _turns(self) -> dict[tuple[int | None, int], Point]:
        """What is handed on, by layer and by its turn there."""
        counts: dict[int | None, int] = {}
        found = {}
        for point in self.points:
            if point.is_boundary:
                turn = counts.get(point.layer, 0)
                counts[point.layer] = turn + 1
                found[(point.layer, turn)] = point
        return found

    def node(self, point: Point) -> ir.Node:
        """The node that makes the value of a point."""
        return self._makers[point.value]

    def name_of(self, value: ir.Value | None) -> str:
        """A value as it is called in the bundle's graph, with its layer."""
        if value is None:
            return "nothing"
        layer, name = _parted(str(value.name))
        return name if layer is None else f"{name} of layer {layer}"

    def _points(self, boundaries: set[str]) -> Iterator[Point]:
        moving = {id(value) for value in self.model.graph.inputs}
        for node in self.model.graph:
            reads = [value for value in _reads(node) if value is not None]
            if node.op_type == "Constant" or not any(id(value) in moving for value in reads):
                continue
            layer, name = _parted(str(node.name))
            for index, value in enumerate(node.outputs):
                moving.add(id(value))
                if not value.name:
                    continue
                self._makers[str(value.name)] = node
                is_boundary = str(value.name) in boundaries or value.is_graph_output()
                output = _parted(str(value.name))[1]
                yield Point(
                    (layer, name, index), node.op_type, output, str(value.name), is_boundary
                )


def difference_of(found: WrittenOut, right: WrittenOut, point: Point, other: Point) -> str:
    """Why the node of `point` may give something else: what of it differs from the right graph's
    `other`."""
    if point.key != other.key:
        return "the graphs name their nodes otherwise: only what layers hand on was compared"
    one, two = found.node(point), right.node(other)
    if one.op_type != two.op_type:
        return f"it is {one.op_type}, the right graph has {two.op_type}"
    for name in sorted({*one.attributes, *two.attributes}):
        here, there = (_attribute(node, name) for node in (one, two))
        if here != there:
            return f"its {name} is {here}, the right graph has {there}"
    for index, (mine, theirs) in enumerate(zip(one.inputs, two.inputs, strict=False)):
        told = _input_difference(found, right, mine, theirs)
        if told is not None:
            return f"input {index}: {told}"
    if len(one.inputs) != len(two.inputs):
        return f"it reads {len(one.inputs)} values, the right graph {len(two.inputs)}"
    return "it reads the same values: a weight or a nested graph of it holds something else"


def _input_difference(
    found: WrittenOut, right: WrittenOut, mine: ir.Value | None, theirs: ir.Value | None
) -> str | None:
    here, there = _constant(mine), _constant(theirs)
    if here is not None and there is not None:
        if here.shape == there.shape and np.array_equal(here, there, equal_nan=True):
            return None
        return f"it is {_short(here)}, the right graph has {_short(there)}"
    one, two = found.name_of(mine), right.name_of(theirs)
    return None if one == two else f"it reads {one}, the right graph reads {two}"


def _name_calls(model: ir.Model) -> set[str]:
    """Give every call of a function nodes and values of its own names; the values it hands on."""
    boundaries: set[str] = set()
    called: dict[Any, ir.Function] = {}
    calls = [n for n in model.graph if n.op_identifier() in model.functions]
    for layer, call in enumerate(calls):
        function = model.functions[call.op_identifier()].clone()
        for node in function.all_nodes():
            node.name = f"{layer}{_MARK}{node.name}"
            for value in node.outputs:
                if value.name:
                    value.name = f"{layer}{_MARK}{value.name}"
        function.name = f"{function.name}_{layer}"
        call.op_type = function.name
        called[function.identifier()] = function
        boundaries |= {str(value.name) for value in call.outputs}
        boundaries |= {str(value.name) for value in function.outputs}
    for key, function in called.items():
        model.functions[key] = function
    used = {value for call in calls for value in call.inputs if value is not None}
    return boundaries | {str(value.name) for value in used}


def _parted(name: str) -> tuple[int | None, str]:
    layer, mark, rest = name.partition(_MARK)
    return (int(layer), rest) if mark and layer.isdigit() else (None, name)


def _reads(node: ir.Node) -> Iterator[ir.Value | None]:
    """Its inputs, and what its branches read."""
    yield from node.inputs
    for attribute in node.attributes.values():
        graphs = (
            [attribute.as_graph()]
            if attribute.type == ir.AttributeType.GRAPH
            else list(attribute.as_graphs())
            if attribute.type == ir.AttributeType.GRAPHS
            else []
        )
        for graph in graphs:
            for inner in graph.all_nodes():
                yield from inner.inputs


def _attribute(node: ir.Node, name: str) -> str:
    attribute = node.attributes.get(name)
    if attribute is None:
        return "not set"
    graphs = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return "a graph" if attribute.type in graphs else str(attribute.value)


def _constant(value: ir.Value | None) -> Any:
    """What the graph itself holds of a value; None for weights in a file."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None or isinstance(tensor, ir.ExternalTensor) else tensor.numpy()


def _short(values: Any) -> str:
    flat = values.reshape(-1)
    told = ", ".join(f"{value:.6g}" for value in flat[:4].tolist()) if flat.size else ""
    return f"[{told}{', ...' if flat.size > 4 else ''}]" if values.ndim else told
