"""What every rule family shares: the base class, the domain, reading constants off a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import pattern
from onnxscript.rewriter._basics import MatchFailureError

DOMAIN = "mla_deploy"
MICROSOFT = "com.microsoft"  # of ONNX Runtime's own operators
# The masked score: finite, so that a fully masked row is uniform and not NaN.
MASKED = float(np.finfo(np.float32).min)


class Rule(pattern.RewriteRuleClassBase):
    """pattern, check, rewrite, in that order; `check` says why not and which value is to blame."""


class Mismatch(MatchFailureError):
    """Raised by a check: the reason, and the value to blame."""


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The value as numpy when it is known while rewriting, else None."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()


def scalar(value: ir.Value | None) -> float | None:
    array = constant(value)
    return float(array.item()) if array is not None and array.size == 1 else None


def static(value: ir.Value, axis: int) -> int:
    """The size of a static axis. Raises: Mismatch when it is unknown or symbolic."""
    size = value.shape[axis] if value.shape is not None else None
    if not isinstance(size, int):
        raise Mismatch(f"axis {axis} is not static", value)
    return size


def rank(value: ir.Value) -> int:
    if value.shape is None:
        raise Mismatch("rank is unknown", value)
    return len(value.shape)


def attribute(node: ir.Node, name: str) -> Any:
    """The attribute's Python value. Raises: Mismatch when it is absent."""
    if name not in node.attributes:
        raise Mismatch(f"no attribute {name}", node)
    return node.attributes[name].value


def producer(value: ir.Value, op_type: str, domain: str = "") -> ir.Node | None:
    """The node that makes `value`, when it is this operator."""
    node = value.producer()
    if node is not None and node.op_type == op_type and node.domain == domain:
        return node
    return None


def required(value: ir.Value | None) -> ir.Value:
    if value is None:
        raise Mismatch("an operand is missing")
    return value


def required_node(value: ir.Value) -> ir.Node:
    node = value.producer()
    if node is None:
        raise Mismatch("value has no producer", value)
    return node


def ints(op: Any, values: Sequence[int]) -> ir.Value:
    return op.Constant(value_ints=list(values))


def number(op: Any, value: float) -> ir.Value:
    """A constant fp32 scalar."""
    return required(op.Constant(value_float=float(value)))


def nibbles(op: Any, packed: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The low and the high halves of bytes, a byte each."""
    mask, shift = (op.Constant(value=ir.tensor([n], ir.DataType.UINT8)) for n in (15, 4))
    return op.BitwiseAnd(packed, mask), op.BitShift(packed, shift, direction="RIGHT")


def swapped(op: Any, value: ir.Value) -> ir.Value:
    """The last two of four axes exchanged; ONNX Runtime folds it into the product that follows."""
    return op.Transpose(value, perm=[0, 1, 3, 2])


def required_dtype(value: ir.Value) -> ir.DataType:
    if value.dtype is None:
        raise Mismatch("dtype is unknown", value)
    return value.dtype


def as_fp32(op: Any, value: ir.Value, like: ir.Value) -> ir.Value:
    """`value`, which has the dtype of `like`, in fp32; no node when it is there already."""
    if required_dtype(like) == ir.DataType.FLOAT:
        return value
    return op.Cast(value, to=ir.DataType.FLOAT)


def branch(name: str, steps: Sequence[Any]) -> ir.Graph:
    """A subgraph of single-output steps; an int operand is the result of that step."""
    body = Body(name)
    results: list[ir.Value] = []
    for op_type, operands, *attributes in steps:
        inputs = [results[o] if isinstance(o, int) else o for o in operands]
        results.append(getattr(body, op_type)(*inputs, **(attributes[0] if attributes else {})))
    return body.graph(results[-1])


class Body:
    """Builds a subgraph the way a rule's `op` builds a graph: `body.MatMul(a, b)` adds a node.

    Values of the graphs around it may be read. Names start with `name`, so that branches side by
    side can be told apart.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._nodes: list[ir.Node] = []

    def __getattr__(self, op_type: str) -> Any:
        if op_type.startswith("_"):
            raise AttributeError(op_type)

        def add(*inputs: ir.Value, _outputs: int = 1, _domain: str = "", **attributes: Any) -> Any:
            given = attributes or None
            node = ir.node(op_type, inputs, attributes=given, domain=_domain, num_outputs=_outputs)
            for place, output in enumerate(node.outputs):
                output.name = f"{self._name}_{len(self._nodes)}_{place}"
            self._nodes.append(node)
            return node.outputs[0] if _outputs == 1 else tuple(node.outputs)

        return add

    def graph(self, *outputs: ir.Value, inputs: Sequence[ir.Value] = ()) -> ir.Graph:
        """`inputs`: of a loop's body; a branch has none."""
        return ir.Graph(list(inputs), list(outputs), nodes=self._nodes, name=self._name)
