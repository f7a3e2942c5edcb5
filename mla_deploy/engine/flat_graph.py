"""A graph as TensorRT will see it: functions inlined, types known, and every node's own path.

Weights are not read. A node keeps the calls that lead to it, so that what is wrong inside a
model-local function is told as `outer (Layer) > inner`.
"""

from __future__ import annotations

import graphlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, ShapeInferencePass

_CALL = "mla_deploy.call."
_NAME = "mla_deploy.node"
Sizes = tuple[int | str | None, ...]
_BOOL = frozenset(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Not",
                   "Xor", "IsNaN", "IsInf"))  # fmt: skip
_INDEX = frozenset(("Shape", "Size", "ArgMax", "ArgMin", "NonZero"))
_SMALL_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class FlatNode:
    """One node: `operator` is "Op", or "domain::Op" outside ONNX's own domain."""

    operator: str
    path: str
    node: ir.Node

    def input(self, index: int) -> ir.Value | None:
        """Input `index`, None when it is left out."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def attribute(self, name: str, default: Any) -> Any:
        """An attribute's plain value."""
        found = self.node.attributes.get(name)
        return default if found is None or found.is_ref() else found.value


@dataclass(frozen=True)
class FlatGraph:
    """The main graph of a model, flat; `dangling` holds (node path, name) of what nothing makes."""

    folder: Path
    opset: int
    nodes: tuple[FlatNode, ...]
    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    initializers: tuple[ir.Value, ...]
    dangling: tuple[tuple[str, str], ...] = ()

    @property
    def input_sizes(self) -> dict[str, Sizes]:
        """The dims of each graph input by its name."""
        return {value.name or "": sizes_of(value) or () for value in self.inputs}

    def named(self, *operators: str) -> Iterator[FlatNode]:
        """The nodes of these operators."""
        return (node for node in self.nodes if node.operator in operators)


def read_flat_graph(path: Path) -> FlatGraph:
    """The graph in an ONNX file. Raises whatever onnx_ir does on a file that is no model."""
    model = ir.load(path)
    dangling = tuple(_dangling(model))
    if not dangling:
        _mark_calls(model)
        InlinePass()(model)
        _infer(model)
    graph = model.graph
    nodes = tuple(_flat(node) for node in graph.all_nodes())
    for node in nodes:
        _guess_types(node.node)
    return FlatGraph(
        path.parent,
        graph.opset_imports.get("", 0),
        nodes,
        tuple(graph.inputs),
        tuple(graph.outputs),
        tuple(graph.initializers.values()),
        dangling,
    )


def sizes_of(value: ir.Value | None) -> Sizes | None:
    """The dims of a value: a size, a word, or None where not even that is known."""
    if value is None or value.shape is None:
        return None
    return tuple(size if isinstance(size, int) else size.value for size in value.shape.dims)


def constant_of(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """The numbers of a small constant, None when it is no constant or not a small one."""
    tensor = value.const_value if value is not None else None
    producer = value.producer() if value is not None else None
    if tensor is None and producer is not None and producer.op_type == "Constant":
        found = producer.attributes.get("value")
        tensor = found.as_tensor() if found is not None else None
    if tensor is None or tensor.size > _SMALL_ELEMENTS:
        return None
    return tensor.numpy()


def _flat(node: ir.Node) -> FlatNode:
    operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    calls = sorted(key for key in node.metadata_props if key.startswith(_CALL))
    name = node.metadata_props.get(_NAME) or node.name or ""
    path = [node.metadata_props[key] for key in calls] + [f"{name} ({operator})".strip()]
    return FlatNode(operator, " > ".join(path), node)


def _mark_calls(model: ir.Model) -> None:
    """Give each call a mark that inlining hands down to the nodes of the function's body.

    Callers come before what they call, so that sorting the marks gives the stack.
    """
    calls: dict[Any, set[Any]] = {
        key: {n.op_identifier() for n in function.all_nodes()} & set(model.functions)
        for key, function in model.functions.items()
    }
    inner_first = list(graphlib.TopologicalSorter(calls).static_order())
    bodies = [model.graph, *(model.functions[key].graph for key in reversed(inner_first))]
    for depth, body in enumerate(bodies):
        for index, node in enumerate(body.all_nodes()):
            if node.op_identifier() in model.functions:
                call = f"{node.name or ''} ({node.op_type})".strip()
                node.metadata_props[f"{_CALL}{depth:04}.{index:06}"] = call
            else:
                node.metadata_props[_NAME] = node.name or ""


def _infer(model: ir.Model) -> None:
    """Shapes and types, as far as they can be told. A graph that is wrong stays as it is: what is
    wrong with it is for the checks to say."""
    logger = logging.getLogger("onnx_ir.passes.common.shape_inference")
    kept = logger.disabled
    logger.disabled = True
    try:
        ShapeInferencePass(check_type=False, strict_mode=False)(model)
    finally:
        logger.disabled = kept


def _dangling(model: ir.Model) -> Iterator[tuple[str, str]]:
    bodies = [("", model.graph)]
    bodies += [(f"{f.name} > ", f.graph) for f in model.functions.values()]
    for where, body in bodies:
        known = {id(value) for value in body.inputs}
        for node in body.all_nodes():
            for value in node.inputs:
                if value is None or value.producer() is not None or id(value) in known:
                    continue
                if not (value.is_graph_input() or value.is_initializer()):
                    yield f"{where}{node.name or ''} ({node.op_type})", value.name or ""


def _guess_types(node: ir.Node) -> None:
    """The types that inference left open, behind operators it does not know."""
    first = node.inputs[0].dtype if node.inputs and node.inputs[0] is not None else None
    if node.op_type == "Cast" and "to" in node.attributes:
        first = ir.DataType(node.attributes["to"].as_int())
    elif node.op_type in _BOOL:
        first = ir.DataType.BOOL
    elif node.op_type in _INDEX:
        first = ir.DataType.INT64
    elif node.op_type in ("Where", "DequantizeLinear") and len(node.inputs) > 1:
        first = node.inputs[1].dtype if node.inputs[1] is not None else None
    for output in node.outputs:
        if output.dtype is None and first is not None:
            output.dtype = first
        if node.op_type == "TopK":
            first = ir.DataType.INT64
