"""Letters for the axes of what attention reads and makes, and values brought into their order.

B rows, H heads, S new tokens, T all tokens, E a key's width, V a value's; X is rows and heads in
one axis, rows outside. Where `heads` is given, the last axis holds them too, outside the width.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir

from mla_deploy.foreign.graph import ROWS, ForeignGraph
from mla_deploy.foreign.stop import Stop
from mla_deploy.source.product_letters import Letters, einsum_letters, matmul_letters


@dataclass(frozen=True)
class Operand:
    """A value and the letters of its axes."""

    value: ir.Value
    axes: str
    heads: int = 0  # in the last axis

    def size(self, graph: ForeignGraph, letter: str) -> int:
        """The size of an axis, 1 where there is none."""
        shape = graph.known.shapes[self.value]
        return shape[self.axes.index(letter)] if letter in self.axes else 1

    def width(self, graph: ForeignGraph) -> int:
        """E or V of one head."""
        letter = "E" if "E" in self.axes else "V"
        return self.size(graph, letter) // max(1, self.heads)

    def count(self, graph: ForeignGraph) -> int:
        """Heads."""
        if self.heads:
            return self.heads
        if "X" in self.axes:
            return self.size(graph, "X") // (ROWS if graph.has_rows else 1)
        return self.size(graph, "H")


def as_heads(array: np.ndarray, operand: Operand, wanted: str, rows: int) -> np.ndarray:
    """An array of an operand with its axes in the order of `wanted`, BH..; H of one if it has none.

    `rows` is B where rows and heads are one axis.
    """
    axes = operand.axes
    if operand.heads:
        array = array.reshape(*array.shape[:-1], operand.heads, -1)
        axes = f"{axes[:-1]}H{axes[-1]}"
    if "X" in axes:
        place = axes.index("X")
        array = array.reshape(*array.shape[:place], rows, -1, *array.shape[place + 1 :])
        axes = axes.replace("X", "BH")
    for letter in "BH":
        if letter not in axes:
            array, axes = array[None], letter + axes
    return array.transpose([axes.index(letter) for letter in wanted])


def product_letters(graph: ForeignGraph, node: ir.Node) -> Letters:
    """Letters of the operands' axes and of the result's, as an einsum spells them. Raises: Stop."""
    operands = [value for value in node.inputs if value is not None]
    if node.op_type == "Einsum":
        equation = node.attributes.get_string("equation", "")
        found = einsum_letters(equation)
        if found is None:
            raise Stop("scores", node, f"{equation!r} is not two operands and '->'")
        return found
    ranks = [len(graph.axes(operand) or ()) for operand in operands[:2]]
    if len(ranks) != 2 or min(ranks) < 2:
        raise Stop("scores", node, "is a product of a vector, or of shapes that cannot be told")
    ends = ["mk", "kn"]
    for place, name in enumerate(("transA", "transB")):
        if node.attributes.get_int(name, 0):
            ends[place] = ends[place][::-1]
    return matmul_letters(ranks, ends)


def named(graph: ForeignGraph, value: ir.Value, letters: str, names: dict[str, str]) -> str:
    """Our letters for an einsum's: rows, heads and both in one are told by their sizes."""
    axes = graph.axes(value)
    if axes is None or len(axes) != len(letters):
        raise Stop("scores", value, "its shape cannot be told")
    found = ""
    for place, (letter, size) in enumerate(zip(letters, axes, strict=True)):
        rows = {"B": "B", "B?": "X"}.get(str(size))
        if rows is None and size == 1 and place == 0 and len(axes) == 4:
            rows = "B"
        found += names.get(letter) or rows or "H"
    if len(set(found)) != len(found):
        raise Stop("scores", value, f"its axes {list(axes)} are not rows, heads, tokens and widths")
    return found


def permutation(graph: ForeignGraph, node: ir.Node) -> list[int]:
    """For each axis of the result, the axis of the argument."""
    rank = len(graph.axes(node.outputs[0]) or ())
    return [int(axis) for axis in node.attributes.get_ints("perm", range(rank)[::-1])]


def placed_rows(graph: ForeignGraph, value: ir.Value, rows_TW: np.ndarray) -> np.ndarray:
    """Rows [T, W] of one batch row in the axes of `value`."""
    axes = graph.axes(value) or ()
    sizes = [size for size in axes if isinstance(size, int)]
    array = rows_TW.reshape(1, rows_TW.shape[0], *sizes)
    if "B" not in axes:
        array, at = array[0], {"S": 0}
    else:
        at = {"B": 0, "S": 1}
    rest = iter(range(len(at), array.ndim))
    return array.transpose([at[a] if isinstance(a, str) else next(rest) for a in axes])


def inner_size(graph: ForeignGraph, value: ir.Value) -> int:
    """The product of the axes that are neither rows nor tokens."""
    return prod(size for size in graph.axes(value) or () if isinstance(size, int))
