"""What depends on positions alone, computed for the positions of each row.

A foreign graph counts one range of positions for all rows. Here every row has its own, so what is
made of them is made once for all B*S positions of a call, as if they were one long row, and brought
back to [B, ..., S, ...] where it is read:

    # before:  Range(past, past + S) -> ... -> cos [1, S, R] --Mul(query [B, S, R])
    # after:   positions [B*S]       -> ... -> cos [1, B*S, R] --Reshape [B, S, R]--Mul(query)
"""

from __future__ import annotations

import onnx_ir as ir

from mla_deploy.errors import InputError
from mla_deploy.foreign.graph import NEW, PAST, ROWS, ForeignGraph
from mla_deploy.foreign.nodes import Nodes
from mla_deploy.foreign.step import StepNodes
from mla_deploy.foreign.stop import shown
from mla_deploy.rewrite.rule import required

# Operators that broadcast: a table may be one of their operands.
_ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Where", "Max", "Min", "Pow"}


class Places:
    """Tables of positions, each made once."""

    def __init__(self, graph: ForeignGraph, nodes: Nodes, step: StepNodes) -> None:
        self._graph, self._nodes, self._step = graph, nodes, step
        self._known = graph.known
        flat = nodes.Reshape(step.positions_BS, nodes.ints(-1))
        self._flat_F = flat
        self._count_1 = nodes.Shape(flat)
        self._made: dict[ir.Value, ir.Value] = {}
        self._by_row = self._batched()

    def is_by_row(self, value: ir.Value) -> bool:
        """Whether a value follows from position inputs that have an axis of rows already."""
        return value in self._by_row

    def placed(self, table: ir.Value, reader: ir.Node, place: int) -> ir.Value:
        """`table` as operand `place` of `reader`. Raises: InputError REW-POSITION."""
        axes = self._graph.axes(table)
        wanted = self._graph.axes(reader.outputs[0])
        if axes is None or wanted is None:
            raise _refused(reader, "its shape cannot be told")
        if axes.count("S") == 0:
            raise _refused(reader, "it has no axis of new tokens")
        at = axes.index("S") - len(axes)
        if reader.op_type == "RotaryEmbedding" and place == 3:
            at, wanted = -1, ("B", "S")
        elif reader.op_type == "RotaryEmbedding":
            wanted = ("B", "S", *axes[-1:])
        elif reader.op_type not in _ELEMENTWISE:
            raise _refused(reader, "it does not multiply or add them")
        if (
            axes.count("S") != 1
            or -at > len(wanted)
            or wanted[at] != "S"
            or "B" not in wanted[:at]
            or any(axis not in (1, "B") for axis in axes[: at + len(axes)])
        ):
            raise _refused(reader, f"they are {list(axes)} there")
        dims: list[ir.Value] = []
        rank, row = len(wanted), wanted.index("B")
        for index in range(rank):
            own = index - rank + len(axes)
            if index == row:
                dims.append(self._step.batch_1)
            elif index == rank + at:
                dims.append(self._step.new_1)
            else:
                size = axes[own] if own > at + len(axes) else 1
                if not isinstance(size, int):
                    raise _refused(reader, f"they are {list(axes)} there")
                dims.append(self._nodes.ints(size))
        value = self._value(table)
        found: ir.Value = self._nodes.Reshape(value, self._nodes.Concat(*dims, axis=0))
        return found

    def _batched(self) -> set[ir.Value]:
        inputs = {v for v in self._graph.positions if "B" in (self._graph.axes(v) or ())}
        found = set(inputs)
        for node in self._graph.model.graph:
            entering = [v for v in node.inputs if v is not None and v in self._graph.positional]
            if entering and all(value in found for value in entering):
                found.update(v for v in node.outputs if v in self._graph.positional)
        return found

    def _value(self, value: ir.Value) -> ir.Value:
        """The value with one row of B*S tokens."""
        if value not in self._made:
            self._made[value] = self._copied(value)
        return self._made[value]

    def _copied(self, value: ir.Value) -> ir.Value:
        graph, nodes = self._graph, self._nodes
        if value in graph.positions:
            axes = graph.axes(value) or ()
            flat = self._flat_F if len(axes) == 1 else nodes.Unsqueeze(self._flat_F, nodes.ints(0))
            found: ir.Value = nodes.Cast(flat, to=value.dtype or ir.DataType.INT64)
            return found
        node = value.producer()
        if node is None:
            if value in graph.masks or graph.depends(value):
                raise _refused(value, "positions follow from it")
            return value
        if node.op_type == "Range" and value in graph.positional:
            return self._range(node)
        if node.op_type in ("Shape", "Size"):
            return self._shape(node)
        if graph.depends(value):
            raise _refused(node, "positions follow from it")
        if node.op_type == "CastLike":
            kind = ir.DataType(self._known.dtypes.get(value, int(ir.DataType.FLOAT)))
            kind = ir.DataType.FLOAT if kind.is_floating_point() else kind
            made: ir.Value = nodes.Cast(self._value(required(node.inputs[0])), to=kind)
            return made
        if node.op_type == "Slice":
            cut = self._cut(node)
            if cut is not None:
                return cut
        if node.op_type == "Gather":
            rows = self._looked_up(node)
            if rows is not None:
                return rows
        inputs = [None if each is None else self._value(each) for each in node.inputs]
        attributes = dict(node.attributes)
        results = nodes.node(node.domain, node.op_type, inputs, attributes, len(node.outputs))
        self._made.update(zip(node.outputs, results, strict=True))
        return self._made[value]

    def _range(self, node: ir.Node) -> ir.Value:
        """Positions: counted from 0 with the past added later, or from the past."""
        start, limit, delta = (self._known.scalar(each) for each in node.inputs)
        if delta != 1 or (start, limit) not in ((0, NEW), (PAST, PAST + NEW)):
            raise _refused(node, f"it counts from {start} to {limit}, not the new tokens")
        return self._flat_F

    def _shape(self, node: ir.Node) -> ir.Value:
        """Sizes with one row, B*S new tokens, and nothing cached: positions count the past."""
        source = node.inputs[0]
        shape = self._known.shapes.get(source) if source is not None else None
        if shape is None or node.op_type == "Size":
            raise _refused(node, "positions follow from a size that cannot be told")
        start = node.attributes.get_int("start", 0)
        sizes = shape[start : node.attributes.get_int("end", len(shape))]
        parts = [self._size(node, size) for size in sizes]
        found: ir.Value = parts[0] if len(parts) == 1 else self._nodes.Concat(*parts, axis=0)
        return found

    def _size(self, node: ir.Node, size: int) -> ir.Value:
        if size in (NEW, PAST + NEW):
            return self._count_1
        if size in (ROWS, PAST):
            return self._nodes.ints(1 if size == ROWS else 0)
        if size > ROWS:
            raise _refused(node, "positions follow from a size that cannot be told")
        return self._nodes.ints(size)

    def _cut(self, node: ir.Node) -> ir.Value | None:
        """Rows of a constant table for the new tokens: those of their positions."""
        if len(node.inputs) < 4 or required(node.inputs[0]) in self._graph.positional:
            return None
        start, end, axis = (self._known.scalar(each) for each in node.inputs[1:4])
        if (start, end) not in ((0, NEW), (PAST, PAST + NEW)) or axis is None:
            return None
        table = self._value(required(node.inputs[0]))
        found: ir.Value = self._nodes.Gather(table, self._flat_F, axis=int(axis))
        return found

    def _looked_up(self, node: ir.Node) -> ir.Value | None:
        """Rows of the first rows of a constant table, by position: those of the whole table."""
        table, index = (required(each) for each in node.inputs[:2])
        cut = table.producer()
        if index not in self._graph.positional or cut is None or cut.op_type != "Slice":
            return None
        source = required(cut.inputs[0])
        start = self._known.scalar(cut.inputs[1])
        if source in self._graph.positional or start != 0:
            return None
        found: ir.Value = self._nodes.Gather(
            self._value(source), self._value(index), axis=node.attributes.get_int("axis", 0)
        )
        return found


def _refused(at: ir.Node | ir.Value, reason: str) -> InputError:
    return InputError(
        "REW-POSITION",
        f"{shown(at)} reads positions in a way that is not known: {reason}",
        hint="export the model with `position_ids` [batch, tokens] as an input",
        node=shown(at),
    )
