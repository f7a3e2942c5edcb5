"""Finding places in an exported graph by what they do, and changing what they read.

A layer is a function whose inputs keep the names of the trace (`visible_B1ST`, `slot_BS3`, ...) and
of the module's weights; the trunk is the main graph. Nothing here goes by node names.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from mla_deploy.rewrite.rule import DOMAIN

_NUMBERS = itertools.count()
Home: TypeAlias = ir.Graph | ir.Function


def layers(model: ir.Model) -> list[ir.Function]:
    """The layer kinds, as functions."""
    return [function for function in model.functions.values() if function.domain == DOMAIN]


def formal(home: Home, suffix: str) -> ir.Value | None:
    """The input or initializer of `home` whose name ends so, None when there is none."""
    values = [*home.inputs, *(home.initializers.values() if isinstance(home, ir.Graph) else ())]
    return next((value for value in values if str(value.name).endswith(suffix)), None)


def nodes(home: Home, *op_types: str) -> list[ir.Node]:
    """The nodes of these operators, those of branches included, in order."""
    return [node for node in home.all_nodes() if not op_types or node.op_type in op_types]


def readers(value: ir.Value | None, *op_types: str) -> list[ir.Node]:
    """The nodes that read `value`, of these operators."""
    if value is None:
        return []
    found = {use.node: None for use in value.uses()}
    return [node for node in found if not op_types or node.op_type in op_types]


def only(found: list[ir.Node]) -> ir.Node | None:
    """The one node there is; None when there is none or a choice."""
    return found[0] if len(found) == 1 else None


def known(value: ir.Value | None) -> np.ndarray | None:
    """The value as numpy when the graph holds it."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None or isinstance(tensor, ir.ExternalTensor) else tensor.numpy()


def upstream(value: ir.Value | None, *op_types: str) -> Iterator[ir.Node]:
    """The nodes of these operators that `value` is made from, nearest first."""
    waiting, seen = [value], set()
    while waiting:
        node = None if (now := waiting.pop(0)) is None else now.producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        if not op_types or node.op_type in op_types:
            yield node
        waiting.extend(node.inputs)


def downstream(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The nearest node of this operator that is made from `value`."""
    waiting, seen = [value], set()
    while waiting:
        for node in readers(waiting.pop(0)):
            if node.op_type == op_type:
                return node
            if node not in seen:
                seen.add(node)
                waiting.extend(node.outputs)
    return None


def insert(before: ir.Node, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
    """A new node just before `before`, in its graph; its output."""
    node = ir.node(op_type, inputs, attributes=attributes or None)
    # Given by the branch it stands in, its name could be one that an outer value has.
    node.outputs[0].name = f"mutant_{next(_NUMBERS)}"
    _graph_of(before).insert_before(before, node)
    return node.outputs[0]


def constant(before: ir.Node, value: Any, dtype: Any = np.int64) -> ir.Value:
    """A constant just before `before`."""
    return insert(before, "Constant", value=ir.tensor(np.asarray(value, dtype)))


def reread(node: ir.Node, old: ir.Value, new: ir.Value) -> None:
    """Let `node` read `new` wherever it read `old`."""
    for index, value in enumerate(node.inputs):
        if value is old:
            node.replace_input_with(index, new)


def wrap(node: ir.Node, index: int, edit: Callable[[ir.Node, ir.Value], ir.Value]) -> bool:
    """Replace input `index` of `node` by what `edit` makes of it."""
    value = node.inputs[index]
    if value is None:
        return False
    node.replace_input_with(index, edit(node, value))
    return True


def wrap_reads(value: ir.Value | None, edit: Callable[[ir.Node, ir.Value], ir.Value]) -> int:
    """Do that at every reader of `value`; how many there were."""
    found = readers(value)
    for node in found:
        new = edit(node, value)  # type: ignore[arg-type]
        reread(node, value, new)  # type: ignore[arg-type]
    return len(found)


def bypass(node: ir.Node, index: int = 0) -> int:
    """Let the readers of `node` read its input `index` instead; 1, or 0 without such an input."""
    kept = node.inputs[index]
    if kept is None:
        return 0
    if node.outputs[0].is_graph_output():
        # A graph's output keeps its own value and name.
        kept = insert(node, "Identity", kept)
    node.outputs[0].replace_all_uses_with(kept, replace_graph_outputs=True)
    return 1


def _graph_of(node: ir.Node) -> Any:
    if node.graph is None:
        raise ValueError(f"{node.op_type} is in no graph")
    return node.graph
