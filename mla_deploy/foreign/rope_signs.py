"""What a foreign graph shows of its rotary embedding: inverse frequencies, and their factor.

Plain rotary embedding has geometric frequencies, theta^(-2i/R). Context extension (YaRN, llama3,
longrope) bends them, and a graph shows that without its config. They stand in the graph as the
constant that positions are multiplied with, or in tables of cosines and sines.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mla_deploy.foreign.attention import SAME, VIEWS
from mla_deploy.foreign.graph import ForeignGraph
from mla_deploy.foreign.turning import ancestors

_MOST = 1 << 24  # values of a table that is looked at
_BENT = 0.05  # of the logarithm of a step from one frequency to the next
_CLOSE = 1e-4
_PASSED = SAME | VIEWS | {"Transpose", "Expand", "Concat", "Tile", "Slice"}


@dataclass(frozen=True)
class RopeSigns:
    """`factor` multiplies cosines and sines; `where` names what was read."""

    where: str
    frequencies: tuple[float, ...]  # radians a position, of each pair
    factor: float

    @property
    def is_extended(self) -> bool:
        """Whether they are no geometric row: the context was extended."""
        logs = np.log(np.array(self.frequencies))
        if len(logs) < 3:
            return False
        steps = np.diff(logs)
        return bool(np.ptp(steps) > _BENT * max(1e-9, float(np.abs(steps).mean())))


def rope_signs(graph: ForeignGraph, rope: int) -> RopeSigns | None:
    """Of the main rotary embedding of width `rope`; None where the graph does not show it."""
    if rope < 4:
        return None
    return next(iter(_from_cosines(graph, rope)), None) or _from_tables(graph, rope)


def _from_cosines(graph: ForeignGraph, rope: int) -> Iterator[RopeSigns]:
    for node in graph.model.graph:
        if node.op_type != "Cos" or node.inputs[0] is None:
            continue
        for value in ancestors([node.inputs[0]], _is_product):
            found = number_of(graph, value)
            if found is None or found.dtype.kind != "f":
                continue
            if found.size in (rope // 2, rope) and found.min() > 0 and found.max() <= 1:
                half = np.sort(np.unique(found.reshape(-1).astype(np.float64)))[::-1]
                if len(half) == rope // 2:
                    yield RopeSigns(str(value.name), tuple(map(float, half)), _factor(graph, node))


def _is_product(node: ir.Node) -> bool:
    """Whether what it makes is its inputs, moved or multiplied."""
    return node.op_type in _PASSED | {"Mul", "MatMul", "Einsum"}


def _factor(graph: ForeignGraph, cosine: ir.Node) -> float:
    """The number that the cosines are multiplied with, by attention_factor or YaRN's mscale."""
    waiting = [cosine.outputs[0]]
    for value in waiting:
        for user, place in value.uses():
            if user.op_type == "Mul":
                number = graph.known.scalar(user.inputs[1 - place])
                if number is not None:
                    return float(number)
            elif user.op_type in _PASSED and place == 0 and len(waiting) < 16:
                waiting.append(user.outputs[0])
    return 1.0


def _from_tables(graph: ForeignGraph, rope: int) -> RopeSigns | None:
    """Row 0 of the cosines is one number everywhere; row 1 holds the angles of one position."""
    cosines, sines = [], []
    for value in graph.model.graph.initializers.values():
        table = number_of(graph, value)
        if table is None or table.dtype.kind != "f" or table.ndim < 2:
            continue
        table = table.reshape(-1, table.shape[-1])
        if table.shape[-1] not in (rope // 2, rope) or len(table) < 8:
            continue
        first = table[0].astype(np.float64)
        if np.ptp(first) <= _CLOSE and 0.25 < first[0] < 4:
            cosines.append((value, table))
        elif np.abs(first).max() <= _CLOSE and np.abs(table[1]).max() > _CLOSE:
            sines.append((value, table))
    if not cosines or not sines:
        return None
    (value, cosine), (_, sine) = cosines[0], sines[0]
    if cosine.shape != sine.shape:
        return None
    factor = float(cosine[0, 0])
    angles = np.arctan2(sine[1].astype(np.float64), cosine[1].astype(np.float64))
    half = np.sort(np.unique(angles[angles > 0]))[::-1]
    if len(half) != rope // 2:
        return None
    return RopeSigns(str(value.name), tuple(map(float, half)), factor)


def number_of(graph: ForeignGraph, value: ir.Value | None) -> np.ndarray | None:
    """A constant's numbers, None when it is no constant or a large one."""
    if value is None:
        return None
    tensor = value.const_value
    if tensor is not None:
        return None if tensor.size > _MOST else tensor.numpy()
    return graph.known.values.get(value)
