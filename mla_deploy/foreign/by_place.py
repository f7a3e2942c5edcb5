"""Whether tables of positions say of a place what they say of it in any other call.

Here the rows of one call stand at different places, and all are placed at once (`places.py`). A
table that also looks at how many tokens there are, as longrope's does, goes by the longest row of a
call: right for each row alone, and for rows that are all on one side of its turning point. That is
computed, not believed: some places alone, the same among many.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np
import onnx_ir as ir

from mla_deploy.errors import InputError
from mla_deploy.foreign.causal import given_inputs
from mla_deploy.foreign.graph import ForeignGraph, Sizes
from mla_deploy.foreign.region import Region
from mla_deploy.foreign.stop import Stop, shown
from mla_deploy.foreign.turning import turning_points

_FEW, _SOME, _MOST = 4, 64, 1 << 17
_AT_ONCE = 1 << 26  # numbers of tables that are held together
_CLOSE = 1e-5


def switches(region: Region) -> tuple[str, ...]:
    """A note, if there is a table that changes with the number of tokens. Raises: REW-POSITION."""
    graph = region.graph
    tables = [value for value in _tables(graph) if graph.shape(value, Sizes(1, 1, 0)) is not None]
    most = min(graph.most_tokens or _MOST, _MOST)
    for length in dict.fromkeys((min(_SOME, most), *_lengths(graph, tables, most))):
        for group in _groups(graph, _concerned(graph, tables, length), length):
            found = _other(region, group, length)
            if found is not None:
                return (
                    f"{shown(found)} changes with the number of tokens, below {length}: rows of a "
                    "batch must all be shorter than that, or all longer",
                )
    return ()


def _tables(graph: ForeignGraph) -> Iterator[ir.Value]:
    """Values with one row for each new token that positions alone decide, read by tokens."""
    found: dict[ir.Value, None] = {}
    for node in graph.model.graph:
        if graph.depends(node.outputs[0]):
            found.update(dict.fromkeys(v for v in node.inputs if v in graph.positional and v))
    for value in found:
        axes = graph.axes(value) or ()
        is_given = value.producer() is None
        if axes.count("S") == 1 and "T" not in axes and not is_given:
            yield value


def _lengths(graph: ForeignGraph, tables: Sequence[ir.Value], most: int) -> Iterator[int]:
    for point in turning_points(graph, tables):
        if _FEW < point + 2 <= most:
            yield point + 2


def _concerned(graph: ForeignGraph, tables: Sequence[ir.Value], length: int) -> list[ir.Value]:
    """All for a short length; for a long one those that it was found in."""
    if length <= _SOME:
        return list(tables)
    return [value for value in tables if length - 2 in turning_points(graph, [value])]


def _groups(
    graph: ForeignGraph, tables: Sequence[ir.Value], length: int
) -> Iterator[list[ir.Value]]:
    group, held = list[ir.Value](), 0
    for value in tables:
        count = prod(graph.shape(value, Sizes(1, length, 0)) or (1,))
        if group and held + count > _AT_ONCE:
            yield group
            group, held = [], 0
        group.append(value)
        held += count
    if group:
        yield group


def _other(region: Region, tables: Sequence[ir.Value], length: int) -> ir.Value | None:
    """`length` tokens at once against the first of them, and the last: a table that differs."""
    graph = region.graph
    few = min(_FEW, length)
    whole = _computed(region, tables, Sizes(1, length, 0))
    calls = [(Sizes(1, few, 0), 0)]
    if graph.caches:
        calls.append((Sizes(1, few, length - few), length - few))
    for sizes, first in calls:
        for value, wanted, found in zip(
            tables, whole, _computed(region, tables, sizes), strict=True
        ):
            axis = (graph.axes(value) or ()).index("S")
            part = wanted.take(np.arange(first, first + few), axis=axis)
            if not np.allclose(part, found, rtol=_CLOSE, atol=_CLOSE, equal_nan=True):
                return value
    return None


def _computed(region: Region, tables: Sequence[ir.Value], sizes: Sizes) -> list[np.ndarray]:
    known = region.known(sizes)
    found = {value: known.value(value) for value in tables}
    rest = [value for value in tables if found[value] is None]
    if rest:
        try:
            made = region.values(rest, given_inputs(region, sizes), sizes, "positions")
        except Stop as stop:
            raise InputError(
                "REW-POSITION",
                f"{stop.node} reads positions in a way that is not known: {stop.reason}",
                hint="export the model with `position_ids` [batch, tokens] as an input",
                node=stop.node,
            ) from None
        found.update(zip(rest, made, strict=True))
    return [np.asarray(found[value]) for value in tables]
