"""Adds nodes to a graph the way a rule's `op` does: `nodes.MatMul(a, b)` appends one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from mla_deploy.rewrite.rule import DOMAIN

Dims = Sequence[int | str | None]


class Nodes:
    """Appends nodes to `graph`; the order is put right afterwards."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._count = 0

    def __getattr__(self, op_type: str) -> Any:
        if op_type.startswith("_"):
            raise AttributeError(op_type)

        def add(*inputs: ir.Value | None, _outputs: int = 1, **attributes: Any) -> Any:
            made = self.node("", op_type, inputs, attributes, _outputs)
            return made[0] if _outputs == 1 else made

        return add

    def composite(
        self, op_type: str, inputs: Sequence[ir.Value], dims: Sequence[Dims], **attributes: Any
    ) -> tuple[ir.Value, ...]:
        """A composite of our domain; `dims` are the shapes of its fp32 results."""
        made = self.node(DOMAIN, op_type, inputs, attributes, len(dims))
        for value, shape in zip(made, dims, strict=True):
            typed(value, shape)
        return made

    def node(
        self,
        domain: str,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any],
        outputs: int,
    ) -> tuple[ir.Value, ...]:
        """Any node."""
        made = ir.node(
            op_type, inputs, attributes=attributes or None, domain=domain, num_outputs=outputs
        )
        for place, value in enumerate(made.outputs):
            value.name = self._name(op_type, place)
        self.graph.append(made)
        return tuple(made.outputs)

    def constant(self, array: np.ndarray) -> ir.Value:
        """An initializer."""
        name = self._name("constant", 0)
        tensor = ir.tensor(array, name=name)
        value = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value

    def ints(self, *values: int) -> ir.Value:
        """A vector of integers."""
        found: ir.Value = self.Constant(value_ints=list(values))
        return found

    def whole(self, value: int) -> ir.Value:
        """One integer."""
        found: ir.Value = self.Constant(value_int=value)
        return found

    def sliced(self, value: ir.Value, start: int, stop: int, axis: int) -> ir.Value:
        """Places `start` to `stop` of an axis."""
        edges = [self.ints(each) for each in (start, stop, axis, 1)]
        found: ir.Value = self.Slice(value, *edges)
        return found

    def picked(self, value: ir.Value, places: Sequence[int], width: int) -> ir.Value:
        """Places of the last axis, which is `width` long, as slices of neighbours."""
        if list(places) == list(range(width)):
            return value
        runs: list[list[int]] = []
        for place in places:
            if runs and place == runs[-1][1]:
                runs[-1][1] += 1
            else:
                runs.append([place, place + 1])
        parts = [self.sliced(value, first, last, -1) for first, last in runs]
        if not parts:
            return self.sliced(value, 0, 0, -1)
        found: ir.Value = parts[0] if len(parts) == 1 else self.Concat(*parts, axis=-1)
        return found

    def _name(self, op_type: str, place: int) -> str:
        self._count += 1
        return f"mla_deploy.{op_type}.{self._count}.{place}"


def typed(value: ir.Value, dims: Dims, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    """The value with its shape and dtype written on it, which rules read."""
    value.shape, value.type = ir.Shape(dims), ir.TensorType(dtype)
    return value
