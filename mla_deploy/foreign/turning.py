"""Lengths at which a part of a graph may turn into another: the numbers that it holds.

A window, a chunk or a switch of rotary frequencies stands in the graph as a number of tokens. What
is computed for fewer tokens than that does not show it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set

import onnx_ir as ir

from mla_deploy.foreign.graph import NEW, PAST, ROWS, ForeignGraph

# No number of tokens is larger: ends of slices and codes are.
_MOST = 1 << 20
_STAND_INS = {ROWS, NEW, PAST, PAST + NEW}


def turning_points(
    graph: ForeignGraph, values: Iterable[ir.Value], read_by: Set[str] | None = None
) -> tuple[int, ...]:
    """Whole numbers above 1 that `values` are computed from, and rows of tables; in order.

    `read_by`: only single integers that an operator of these reads.
    """
    found: set[int] = set()
    for value in ancestors(values):
        array = graph.known.values.get(value)
        if read_by is not None:
            is_read = any(node.op_type in read_by for node, _ in value.uses())
            if not is_read or array is None or array.size != 1 or array.dtype.kind not in "iu":
                continue
        elif value.const_value is not None and len(value.const_value.shape) > 1:
            found.update(value.const_value.shape.numpy())
        if array is not None and array.dtype.kind in "iuf":
            numbers = (abs(number) for number in array.reshape(-1).tolist())
            found.update(int(number) for number in numbers if number < _MOST)
    near = {size + step for size in _STAND_INS for step in (-1, 0, 1)}
    return tuple(sorted(number for number in found - near if number > 1))


def ancestors(
    values: Iterable[ir.Value], through: Callable[[ir.Node], bool] = lambda _: True
) -> Iterator[ir.Value]:
    """`values` and what they are made of, each once, as far as nodes are let `through`."""
    waiting, seen = list(values), set[ir.Value]()
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        yield value
        node = value.producer()
        if node is not None and through(node):
            waiting.extend(each for each in node.inputs if each is not None)
