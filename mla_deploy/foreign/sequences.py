"""Sequences that only carry parts of a tensor, as exporters write them without optimisation.

# before:  SplitToSequence(x, [20, 8]) -> parts; SequenceAt(parts, 0); SequenceAt(parts, 1)
# after:   Split(x, [20, 8]) -> first, second
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as common_passes


def split_sequences(model: ir.Model) -> None:
    """In place; a sequence that is read in another way stays."""
    found = False
    for node in list(model.graph):
        if node.op_type == "SplitToSequence" and node.domain == "":
            found |= _split(model.graph, node)
    if found:
        common_passes.RemoveUnusedNodesPass()(model)


def _split(graph: ir.Graph, node: ir.Node) -> bool:
    source = node.inputs[0]
    sizes = _sizes(node)
    readers = [(user, _place(user)) for user, _ in node.outputs[0].uses()]
    if source is None or sizes is None or not readers:
        return False
    places = [place for _, place in readers if place is not None]
    if len(places) < len(readers) or not all(-sizes.size <= p < sizes.size for p in places):
        return False
    axis = ir.AttrInt64("axis", node.attributes.get_int("axis", 0))
    name = f"{node.outputs[0].name}.sizes"
    while name in graph.initializers:
        name += "_"
    given = ir.Value(name=name, const_value=ir.tensor(sizes, name=name))
    graph.register_initializer(given)
    parts = ir.Node("", "Split", [source, given], [axis], num_outputs=sizes.size)
    for part in parts.outputs:
        part.type = source.type
    graph.insert_before(node, parts)
    for (user, _), place in zip(readers, places, strict=True):
        old, new = user.outputs[0], parts.outputs[place]
        new.shape = old.shape if new.shape is None else new.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    return True


def _sizes(node: ir.Node) -> np.ndarray | None:
    """How wide each part is; None where it cannot be told."""
    given = _constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if given is None or given.ndim == 1:
        return given
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    whole = shape[node.attributes.get_int("axis", 0)] if shape is not None else None
    if not isinstance(whole, int) or given.item() < 1:
        return None
    starts = np.arange(0, whole, given.item())
    return np.diff(np.append(starts, whole))


def _place(user: ir.Node) -> int | None:
    """Which part a SequenceAt takes."""
    if user.op_type != "SequenceAt" or user.domain != "":
        return None
    found = _constant(user.inputs[1])
    return int(found.item()) if found is not None and found.size == 1 else None


def _constant(value: ir.Value | None) -> np.ndarray | None:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()
