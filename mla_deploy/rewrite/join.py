"""One graph of a bundle's two: what both compute alike stands once, the rest under an `If`.

A session packs quantised weights into memory of its own, so two sessions hold them twice. In the
joined graph a weight is multiplied in one place, whichever of the two graphs is asked for:

# prefill:  x -> A -> p1 -> p2 -> MatMulNBits(W)        x -> A -> If(expanded) -> MatMulNBits(W)
# decode:   x -> A -> d1 -------> MatMulNBits(W)                   p1, p2 | d1

A value of both graphs is the same where operator, attributes and inputs are. Products of the same
weight are anchors: where what they multiply differs, an `If` chooses it. So with EXPANDED true
every value is that of prefill, else that of decode, wherever the anchors are.
"""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx.inliner import inline_local_functions

from mla_deploy.shapes import EXPANDED

# Operators whose weights a session packs.
_PACKING = {
    ("com.microsoft", "MatMulNBits"),
    ("com.microsoft", "QMoE"),
    ("", "MatMul"),
    ("", "Gemm"),
}
_IN_PLACE = {"ScatterND", "TensorScatter"}  # through an `If`, a cache would be copied
_PREFIX = ("prefill.", "decode.")
_BRANCHES = ("then_branch", "else_branch")


class _Unlike(Exception):
    """The two graphs cannot be joined; they stay two."""


def joined_model(prefill: Any, decode: Any) -> Any | None:
    """A ModelProto of both, with one more input EXPANDED, bool []; None where they are too unlike.

    Names of inputs, outputs and weights stay. Both models are left as they were.
    """
    models = inline_local_functions(prefill), inline_local_functions(decode)
    try:
        nodes = _Join(*(model.graph for model in models)).nodes()
    except _Unlike:
        return None
    model = models[1]
    graph = model.graph
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    switch = graph.input.add(name=EXPANDED)
    switch.type.tensor_type.elem_type = onnx.TensorProto.BOOL
    switch.type.tensor_type.shape.SetInParent()
    present = {weight.name for weight in graph.initializer}
    graph.initializer.extend(w for w in models[0].graph.initializer if w.name not in present)
    weights = {weight.name: weight for weight in graph.initializer}
    for inner in _subgraphs(graph):
        _own_weights(inner, weights)
    return model


def _subgraphs(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield attribute.g
                yield from _subgraphs(attribute.g)


def _own_weights(graph: Any, weights: Mapping[str, Any]) -> None:
    """Give products of a subgraph their weights in it: those from two graphs out are not packed."""
    made: dict[str, str] = {}
    for node in graph.node:
        if (node.domain, node.op_type) not in _PACKING:
            continue
        for place, name in enumerate(node.input):
            if name in weights and name not in made:
                own = graph.initializer.add()
                own.CopyFrom(weights[name])
                own.name = made[name] = f"{graph.name}.{graph.node[0].output[0]}.{name}"
            node.input[place] = made.get(name, name)


@dataclass
class _Side:
    """One of the two graphs: what its names stand for, as numbers that both sides share."""

    graph: Any
    prefix: str
    ids: dict[str, int] = field(default_factory=dict)  # of a name, as of now
    names: dict[int, str] = field(default_factory=dict)  # its first name
    makers: dict[int, int] = field(default_factory=dict)  # the node that makes it
    read: list[dict[str, int]] = field(default_factory=list)  # by node: what its names stood for
    made: list[tuple[int, ...]] = field(default_factory=list)  # by node: its outputs


class _Join:
    def __init__(self, prefill: Any, decode: Any) -> None:
        self._known: dict[Any, int] = {}
        self._sides = tuple(map(_Side, (prefill, decode), _PREFIX))
        self._chosen: dict[int, str] = {}  # values that an `If` chooses, by number

    def nodes(self) -> list[Any]:
        """The nodes of the joined graph, in order. Raises: _Unlike."""
        given = _same_given(*(side.graph for side in self._sides))
        for side in self._sides:
            for name in given:
                side.ids[name] = self._number(("given", name))
                side.names[side.ids[name]] = name
        pending: list[tuple[int, list[tuple[int, int, int]]]] = []
        places = [0, 0]
        for anchors in _anchor_pairs(*(side.graph for side in self._sides)):
            for side, first, end in zip(self._sides, places, anchors, strict=True):
                for index in range(first, end):
                    self._read(side, index)
            pending.append((anchors[1], self._choose(anchors)))
            places = list(anchors)
        for side, first in zip(self._sides, places, strict=True):
            for index in range(first, len(side.graph.node)):
                self._read(side, index)
        nodes = [*self._emitted(dict(pending)), *self._outputs()]
        return _in_order(nodes, given)

    def _number(self, key: Any) -> int:
        return self._known.setdefault(key, len(self._known))

    def _read(self, side: _Side, index: int) -> None:
        """Number what node `index` makes."""
        node = side.graph.node[index]
        used = {name: side.ids[name] for name in _uses(node)}
        made = self._number(self._node_key(node, ChainMap(used), 0))
        ids = tuple(self._number((made, place)) for place in range(len(node.output)))
        side.read.append(used)
        side.made.append(ids)
        for name, value in zip(node.output, ids, strict=True):
            side.ids[name] = value
            side.names.setdefault(value, name)
            side.makers.setdefault(value, index)

    def _node_key(self, node: Any, ids: ChainMap[str, int], depth: int) -> Any:
        attributes = []
        for attribute in sorted(node.attribute, key=lambda a: a.name):
            if attribute.HasField("g"):
                told: Any = self._graph_key(attribute.g, ids, depth + 1)
            else:
                told = attribute.SerializeToString(deterministic=True)
            attributes.append((attribute.name, told))
        inputs = tuple(ids[name] if name else None for name in node.input)
        return (node.domain, node.op_type, node.overload, tuple(attributes), inputs,
                len(node.output))  # fmt: skip

    def _graph_key(self, graph: Any, outer: ChainMap[str, int], depth: int) -> Any:
        ids = outer.new_child()
        for place, value in enumerate(graph.input):
            ids[value.name] = self._number(("parameter", depth, place))
        for weight in graph.initializer:
            told = _content(weight)
            ids[weight.name] = self._number(("constant", told))
        for node in graph.node:
            made = self._number(self._node_key(node, ids, depth))
            for place, name in enumerate(node.output):
                ids[name] = self._number((made, place))
        return (len(graph.input), tuple(ids[value.name] for value in graph.output))

    def _choose(self, anchors: tuple[int, int]) -> list[tuple[int, int, int]]:
        """Make the inputs of two products of a weight the same: (chosen, of prefill, of decode)."""
        nodes = [side.graph.node[index] for side, index in zip(self._sides, anchors, strict=True)]
        found = []
        for names in zip(*(node.input for node in nodes), strict=True):
            if "" in names:
                if names[0] != names[1]:
                    raise _Unlike
                continue
            first, second = (s.ids[name] for s, name in zip(self._sides, names, strict=True))
            if first == second:
                continue
            chosen = self._number(("chosen", first, second))
            if chosen not in self._chosen:
                self._chosen[chosen] = f"chosen.{len(self._chosen)}"
                found.append((chosen, first, second))
            for side, name in zip(self._sides, names, strict=True):
                side.ids[name] = chosen
        return found

    def _emitted(self, choices: Mapping[int, Sequence[tuple[int, int, int]]]) -> Iterator[Any]:
        decode = self._sides[1]
        for index, node in enumerate(decode.graph.node):
            if choices.get(index):
                yield self._choice(choices[index])
            if all(self._is_shared(value) for value in decode.made[index]):
                yield self._written(decode, index, list(node.output))

    def _outputs(self) -> Iterator[Any]:
        """What gives out the outputs that are not the same. Raises: _Unlike."""
        prefill, decode = self._sides
        for output in decode.graph.output:
            name = output.name
            value = decode.ids[name]
            other = prefill.ids.get(name, value)
            if value == other and self._is_shared(value):
                continue
            makers = [
                side.graph.node[side.makers[each]].op_type
                for side, each in zip(self._sides, (other, value), strict=True)
                if each in side.makers
            ]
            if name not in prefill.ids or _IN_PLACE.intersection(makers):
                raise _Unlike
            chosen = self._number(("output", name))
            self._chosen[chosen] = name
            yield self._choice([(chosen, other, value)])

    def _is_shared(self, value: int) -> bool:
        return value in self._chosen or all(value in side.names for side in self._sides)

    def _choice(self, chosen: Sequence[tuple[int, int, int]]) -> Any:
        branches = []
        for place, side in enumerate(self._sides):
            wanted = [values[1 + place] for values in chosen]
            nodes, outputs = [], []
            for index in self._cone(side, wanted):
                made = [self._name(side, value) for value in side.made[index]]
                nodes.append(self._written(side, index, made))
            for number, value in enumerate(wanted):
                name = self._name(side, value)
                if self._is_shared(value):
                    copied = f"{side.prefix}copy.{chosen[number][0]}"
                    nodes.append(onnx.NodeProto(op_type="Identity", input=[name], output=[copied]))
                    name = copied
                outputs.append(onnx.ValueInfoProto(name=name))
            branches.append(_attribute(_BRANCHES[place], side.prefix, nodes, outputs))
        names = [self._chosen[values[0]] for values in chosen]
        return onnx.NodeProto(op_type="If", input=[EXPANDED], output=names, attribute=branches)

    def _cone(self, side: _Side, wanted: Iterable[int]) -> list[int]:
        """The nodes that only this side has, of which `wanted` are made."""
        found: set[int] = set()
        stack = list(wanted)
        while stack:
            value = stack.pop()
            if self._is_shared(value) or side.makers[value] in found:
                continue
            found.add(side.makers[value])
            stack += side.read[side.makers[value]].values()
        return sorted(found)

    def _name(self, side: _Side, value: int) -> str:
        if value in self._chosen:
            return self._chosen[value]
        if self._is_shared(value):
            return self._sides[1].names[value]
        return side.prefix + side.names[value]

    def _written(self, side: _Side, index: int, outputs: Sequence[str]) -> Any:
        """Node `index` with the joined graph's names."""
        names = {name: self._name(side, value) for name, value in side.read[index].items()}
        node = _renamed(side.graph.node[index], ChainMap(names), side.prefix)
        node.output[:] = outputs
        return node


def _attribute(name: str, prefix: str, nodes: Sequence[Any], outputs: Sequence[Any]) -> Any:
    graph = onnx.GraphProto(name=prefix.rstrip("."), node=nodes, output=outputs)
    return onnx.AttributeProto(name=name, type=onnx.AttributeProto.GRAPH, g=graph)


def _same_given(prefill: Any, decode: Any) -> list[str]:
    """Inputs and weights: names of one graph are those of the other, or only its own weights."""
    sides = [{value.name: _content(value) for value in graph.input} for graph in (prefill, decode)]
    if list(sides[0]) != list(sides[1]) or [v.name for v in prefill.output if v.name not in
                                            {o.name for o in decode.output}]:  # fmt: skip
        raise _Unlike
    weights = [{w.name: _content(w) for w in graph.initializer} for graph in (prefill, decode)]
    if any(weights[1].get(name, told) != told for name, told in weights[0].items()):
        raise _Unlike
    return list(dict.fromkeys([*sides[0], *weights[0], *weights[1]]))


def _anchor_pairs(*graphs: Any) -> Iterator[tuple[int, int]]:
    """Places of the products of one weight, which each graph has once. Raises: _Unlike."""
    found: list[dict[Any, int]] = []
    for graph in graphs:
        known = {weight.name for weight in graph.initializer}
        keys = [_anchor_key(node, known) for node in graph.node]
        counts = Counter(keys)
        found.append({k: i for i, k in enumerate(keys) if k is not None and counts[k] == 1})
    both = [[key for key in side if key in found[0] and key in found[1]] for side in found]
    if both[0] != both[1]:
        raise _Unlike
    yield from ((found[0][key], found[1][key]) for key in both[0])


def _anchor_key(node: Any, known: set[str]) -> Any | None:
    weights = [(place, name) for place, name in enumerate(node.input) if name in known]
    if not weights or (node.domain, node.op_type) not in _PACKING:
        return None
    attributes = sorted(a.SerializeToString(deterministic=True) for a in node.attribute)
    return (node.domain, node.op_type, tuple(attributes), tuple(weights), len(node.input))


def _uses(node: Any) -> Iterator[str]:
    """Names from outside that a node reads, those of its subgraphs too."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        if attribute.HasField("g"):
            graph = attribute.g
            own = {v.name for v in (*graph.input, *graph.initializer)}
            own.update(name for inner in graph.node for name in inner.output)
            inside = [name for inner in graph.node for name in _uses(inner)]
            yield from (n for n in [*inside, *(v.name for v in graph.output)] if n not in own)


def _renamed(node: Any, names: ChainMap[str, str], prefix: str) -> Any:
    """A copy whose names are `names`; those that its subgraphs make get `prefix`."""
    copy = type(node)()
    copy.CopyFrom(node)
    copy.input[:] = [names[name] if name else "" for name in node.input]
    for attribute in copy.attribute:
        if not attribute.HasField("g"):
            continue
        graph, inner = attribute.g, names.new_child()
        values = [*graph.input, *graph.initializer]
        for name in [*(v.name for v in values), *(n for x in graph.node for n in x.output)]:
            inner[name] = name and prefix + name
        for value in (*values, *graph.output):
            value.name = inner[value.name]
        for place, each in enumerate(graph.node):
            made = _renamed(each, inner, prefix)
            made.output[:] = [inner[name] for name in each.output]
            graph.node[place].CopyFrom(made)
        del graph.value_info[:]
    return copy


def _in_order(nodes: Iterable[Any], given: Iterable[str]) -> list[Any]:
    """`nodes` with makers before readers, else as they come. Raises: _Unlike on a cycle."""
    known, ordered, waiting = {*given, EXPANDED}, [], list(nodes)
    while waiting:
        later = []
        for node in waiting:
            if all(name in known for name in _uses(node)):
                ordered.append(node)
                known.update(node.output)
            else:
                later.append(node)
        if len(later) == len(waiting):
            raise _Unlike
        waiting = later
    return ordered


def _content(value: Any) -> bytes:
    return bytes(value.SerializeToString(deterministic=True))
