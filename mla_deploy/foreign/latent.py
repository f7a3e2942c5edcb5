"""What must be cached of a foreign attention: the narrowest that its keys and values follow from.

Keys and values are followed back for as long as they are linear in what they come from and no
position enters; through a cache of expanded heads, to the new tokens. Of all values that they can
be remade from, those with the fewest numbers a token are taken (a minimum cut). What they are
turned into is read off by sending unit vectors through that part of the graph:

    key_BHTE = latent_BTL W_uk, rope_key_BTR     value_BHTV = latent_BTL W_uv + bias_HV

A bias of the keys is left out: q . b is the same for every cached token, which softmax ignores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import networkx
import numpy as np
import onnx_ir as ir

from mla_deploy.foreign.attention import PRODUCTS, SAME, VIEWS, Site
from mla_deploy.foreign.axes import Operand, as_heads, placed_rows
from mla_deploy.foreign.graph import ForeignGraph, Sizes
from mla_deploy.foreign.region import Region
from mla_deploy.foreign.stop import Stop

# Linear in every operand that the tokens decide.
_SUMS = SAME | VIEWS | {
    "Transpose", "Expand", "Concat", "Split", "Slice", "Gather", "Tile", "Pad", "ScatterND",
    "ScatterElements", "GatherND", "GatherElements", "Add", "Sub", "Sum", "Neg", "Where",
    "ReduceSum",
}  # fmt: skip
# Linear in one.
_SCALES = PRODUCTS | {"Gemm", "Mul", "Div"}
# Which operand the tokens may decide, where not every one.
_FIRST_ONLY = {"Div", "Slice", "Gather", "Expand", "Reshape", "Tile", "GatherND", "GatherElements"}
_SAME_NUMBERS = SAME | VIEWS | {"Transpose", "Mul", "Div"}
_LINEAR_ERROR = 1e-4
_ZERO = 1e-6  # of the largest number, where a bias was taken off


@dataclass(frozen=True)
class Latent:
    """What one attention caches and how its keys and values follow from it.

    `rows`: the values of the cut; one after the other they are a row of numbers for each token.
    `latent` and `rope_key`: places in that row. `columns`: for each column of the key, in N + R
    order, its place in the queries laid side by side, and `factors` on them.
    """

    rows: tuple[ir.Value, ...]
    latent: tuple[int, ...]
    rope_key: tuple[int, ...]
    columns: tuple[int, ...]
    factors: tuple[float, ...]
    w_kv_b: np.ndarray  # [H*(N+V), L] fp32
    heads: int
    nope: int
    value: int
    value_bias_HV: np.ndarray | None
    rope_factor: float = 1.0  # taken off the keys: belongs to the scale

    @property
    def rank(self) -> int:
        return len(self.latent)

    @property
    def rope(self) -> int:
        return len(self.rope_key)


def latent_of(region: Region, site: Site) -> Latent:
    """The latent of an attention. Raises: Stop."""
    graph = region.graph
    operands = [*(score.key for score in site.scores), site.value]
    rows = _narrowest(graph, site, [operand.value for operand in operands])
    _require_own(graph, site, rows)
    made = _made(region, site, rows, operands)
    heads = max(score.query.count(graph) for score in site.scores)
    key_HEW = np.concatenate([_all_heads(matrix, heads) for matrix, _ in made[:-1]], axis=1)
    value_HVW, bias_HV = (_all_heads(part, heads) for part in made[-1])
    width, expanded = key_HEW.shape[2], heads * (key_HEW.shape[1] + value_HVW.shape[1])
    if width >= expanded:
        raise Stop(
            "latent",
            rows[0],
            f"keys and values are {expanded} numbers a token and the narrowest that they are made "
            f"from is {width}: no latent",
        )
    copies = max(int((part != 0).sum(axis=2).max(initial=0)) for part in (key_HEW, value_HVW)) <= 1
    # An absorbed graph copies too, but its values are part of the row that its keys are.
    if copies and width >= key_HEW.shape[1] + value_HVW.shape[1]:
        raise Stop(
            "latent",
            rows[0],
            f"keys and values are the {width} numbers a token that they are made from, copied to "
            f"{heads} heads: full or grouped heads, no latent",
        )
    return _canonical(site, rows, key_HEW, (value_HVW, bias_HV))


def _require_own(graph: ForeignGraph, site: Site, rows: Sequence[ir.Value]) -> None:
    """A latent is for keys and values alone. What queries are made of too is the layer's input:
    narrower than all heads together, and no latent.
    """
    wanted, seen = {_same_numbers(graph, value) for value in rows}, set[ir.Value]()
    waiting = [score.query.value for score in site.scores]
    while waiting:
        value = waiting.pop()
        if value in wanted:
            raise Stop(
                "latent",
                value,
                "queries, keys and values are all made from it: full or grouped heads, no latent",
            )
        node = value.producer()
        if value in seen or node is None or value not in graph.from_ids:
            continue
        seen.add(value)
        waiting.extend(each for each in node.inputs if each is not None)


def _same_numbers(graph: ForeignGraph, value: ir.Value) -> ir.Value:
    """Where a value was before it was moved or scaled."""
    while (node := value.producer()) is not None:
        inputs = [each for each in node.inputs if each in graph.from_ids]
        if node.op_type not in _SAME_NUMBERS or len(inputs) != 1 or inputs[0] is None:
            break
        value = inputs[0]
    return value


def _all_heads(part: np.ndarray, heads: int) -> np.ndarray:
    """A key head serves the query heads of its group."""
    return np.repeat(part, heads // part.shape[0], axis=0)


def _is_linear(graph: ForeignGraph, node: ir.Node) -> bool:
    if node.domain not in ("", "com.microsoft"):
        return False
    inputs = [value for value in node.inputs if value is not None]
    variable = [value for value in inputs if value in graph.from_ids]
    if any(value in graph.positional for value in inputs):
        return False  # positions enter
    if node.op_type in _FIRST_ONLY and variable != inputs[:1]:
        return False
    if node.op_type in ("Slice", "Gather") and not _keeps_tokens(graph, node):
        return False
    if node.op_type == "ReduceSum":
        return _keeps_tokens(graph, node)
    if node.op_type in _SUMS:
        return node.op_type != "Where" or inputs[0] not in graph.from_ids
    return node.op_type in _SCALES and len(variable) == 1


def _keeps_tokens(graph: ForeignGraph, node: ir.Node) -> bool:
    """Along another axis than tokens, or of all tokens."""
    found = [
        [axis for axis in graph.axes(value) or () if axis in ("S", "T")]
        for value in (node.inputs[0], node.outputs[0])
        if value is not None
    ]
    return found[0] == found[1]


def _narrowest(graph: ForeignGraph, site: Site, ends: Sequence[ir.Value]) -> tuple[ir.Value, ...]:
    """The minimum cut, nearest to `ends`: networkx gives the one nearest to where the flow goes."""
    network = networkx.DiGraph()
    waiting, seen = list(ends), dict.fromkeys(ends)
    blocked: list[ir.Node | ir.Value] = []
    for value in ends:
        network.add_edge((value, 1), "ends", capacity=inf)
    while waiting:
        value = waiting.pop()
        width = graph.elements(value)
        network.add_edge((value, 0), (value, 1), capacity=inf if width is None else width)
        node = value.producer()
        if node is None or not _is_linear(graph, node):
            network.add_edge("sources", (value, 0), capacity=inf)
            if width is None:
                blocked.append(node or value)
            continue
        for parent in node.inputs:
            if parent is not None and parent in graph.from_ids:
                network.add_edge((parent, 1), (value, 0), capacity=inf)
                if parent not in seen:
                    seen[parent] = None
                    waiting.append(parent)
    if "sources" not in network:
        raise Stop("latent", ends[0], "keys and values do not follow from the tokens")
    try:
        _, (far, _) = networkx.minimum_cut(network, "sources", "ends")
    except networkx.NetworkXUnbounded:
        raise Stop(
            "latent",
            blocked[0] if blocked else ends[0],
            "keys and values follow from more than one row a token: this is not linear, or "
            "depends on positions",
        ) from None
    cut = [value for value in seen if (value, 0) in far and (value, 1) not in far]
    order = {value: place for place, value in enumerate(_values(graph))}
    # The latent first: it is wider than the rope key. Equal ones as the graph computes them.
    return tuple(sorted(cut, key=lambda value: (-(graph.elements(value) or 0), order[value])))


def _values(graph: ForeignGraph) -> list[ir.Value]:
    inputs = list(graph.model.graph.inputs)
    return inputs + [value for node in graph.model.graph for value in node.outputs]


def _made(
    region: Region, site: Site, rows: Sequence[ir.Value], operands: Sequence[Operand]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each operand as a matrix [H, its width, W] from a row of the cut, and its bias [H, width]."""
    graph = region.graph
    widths = [graph.elements(value) or 0 for value in rows]
    width = sum(widths)
    asked_TW = np.random.default_rng(0).standard_normal((3, width))
    probe_TW = np.concatenate((np.eye(width), np.zeros((1, width)), asked_TW)).astype(np.float32)
    parts = np.split(probe_TW, np.cumsum(widths)[:-1], axis=1)
    given = {
        value: placed_rows(graph, value, part) for value, part in zip(rows, parts, strict=True)
    }
    arrays = [given.get(operand.value) for operand in operands]
    missing = [operand.value for operand in operands if operand.value not in given]
    if missing:
        sizes = Sizes(1, probe_TW.shape[0], 0)
        computed = dict(
            zip(missing, region.values(missing, given, sizes, "expansion"), strict=True)
        )
        arrays = [computed.get(o.value, given.get(o.value)) for o in operands]
    found = []
    for operand, array in zip(operands, arrays, strict=True):
        last = "V" if operand is operands[-1] else "E"
        if array is None:
            raise Stop("expansion", operand.value, "it cannot be computed")
        made_HTE = as_heads(array, operand, f"BHT{last}", 1)[0].astype(np.float32)
        bias_HE = made_HTE[:, width]
        matrix_HEW = (made_HTE[:, :width] - bias_HE[:, None]).swapaxes(1, 2)
        if bias_HE.any():
            matrix_HEW[np.abs(matrix_HEW) <= _ZERO * np.abs(made_HTE).max()] = 0
        wanted = probe_TW[width + 1 :] @ matrix_HEW.swapaxes(1, 2) + bias_HE[:, None]
        limit = _LINEAR_ERROR * (1 + float(np.abs(wanted).max(initial=0)))
        if not float(np.abs(made_HTE[:, width + 1 :] - wanted).max(initial=0)) <= limit:
            raise Stop("expansion", operand.value, "it is not linear in the latent, token by token")
        found.append((matrix_HEW, bias_HE))
    return found


def _canonical(
    site: Site,
    rows: tuple[ir.Value, ...],
    key_HEW: np.ndarray,
    values: tuple[np.ndarray, np.ndarray],
) -> Latent:
    """Tell the rope key from the latent, and the key's columns that read the one or the other."""
    value_HVW, bias_HV = values
    used_by_key_EW = (key_HEW != 0).any(axis=0)
    used_by_value_W = (value_HVW != 0).any(axis=(0, 1))
    same_EW = (key_HEW == key_HEW[:1]).all(axis=0)
    # A column of the key that copies one place of the row, for every head alike.
    copies_E = (used_by_key_EW.sum(axis=1) == 1) & same_EW.all(axis=1)
    shared_W = used_by_key_EW.any(axis=0) & ~used_by_value_W
    shared_W &= ~(used_by_key_EW & ~copies_E[:, None]).any(axis=0)
    rope_key = [int(place) for place in np.flatnonzero(shared_W)]
    turned_E = copies_E & used_by_key_EW[:, shared_W].any(axis=1)
    columns = [int(c) for c in np.flatnonzero(used_by_key_EW.any(axis=1) & ~turned_E)]
    nope, factors = len(columns), [1.0] * len(columns)
    for place in rope_key:
        copying = np.flatnonzero(used_by_key_EW[:, place])
        if len(copying) != 1:
            raise Stop(
                "rope key",
                site.scores[0].key.value,
                f"place {place} of the shared key stands in {len(copying)} columns of the keys, "
                "wanted one",
            )
        columns.append(int(copying[0]))
        factors.append(float(key_HEW[0, copying[0], place]))
    used_W = used_by_key_EW.any(axis=0) | used_by_value_W
    latent = [int(place) for place in np.flatnonzero(used_W & ~shared_W)]
    if not latent or not nope:
        raise Stop(
            "rope key", site.scores[0].key.value, "the keys are one shared vector, no latent"
        )
    # A scale on the keys: one for the whole score.
    shared = factors[nope] if len(set(factors[nope:])) == 1 and factors[nope] > 0 else 1.0
    key_HNL = key_HEW[:, columns[:nope]][..., latent] / shared
    w_HKL = np.concatenate((key_HNL, value_HVW[..., latent]), axis=1)
    return Latent(
        rows=rows,
        latent=tuple(latent),
        rope_key=tuple(rope_key),
        columns=tuple(columns),
        factors=tuple(factors) if shared == 1.0 else (1.0,) * len(factors),
        w_kv_b=np.ascontiguousarray(w_HKL.reshape(-1, len(latent)), dtype=np.float32),
        heads=key_HEW.shape[0],
        nope=nope,
        value=value_HVW.shape[1],
        value_bias_HV=bias_HV if bias_HV.any() else None,
        rope_factor=shared,
    )
