"""What must be cached of an attention: the narrowest values that its keys and values follow from.

Keys and values are followed back for as long as they are linear in what they come from and no
position enters. Of all sets of values that they can be remade from, the one with the fewest numbers
a token is taken (a minimum cut); among equals the one nearest to the attention. What the cut is
turned into is read off by sending unit vectors through that part of the graph, so the weights may
be laid out in any way:

    key_BHTE = latent_BTL W_uk, rope_key_BTR     value_BHTV = latent_BTL W_uv + bias_HV

A bias of the keys is left out: q . b is the same for every cached token, which softmax ignores. One
of the values is added to the result, for the weights of a token sum to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import networkx
import torch
from torch import fx

from mla_deploy.errors import InputError
from mla_deploy.source.user.attention import SAME, Operand, Site
from mla_deploy.source.user.graph import ATEN, UserGraph, Values

_MOVES = SAME | {
    ATEN.view.default, ATEN.reshape.default, ATEN._unsafe_view.default, ATEN.permute.default,
    ATEN.transpose.int, ATEN.t.default, ATEN.unsqueeze.default, ATEN.squeeze.dim,
    ATEN.squeeze.dims, ATEN.squeeze.default, ATEN.expand.default, ATEN.flatten.using_ints,
    ATEN.unflatten.int, ATEN.split.Tensor, ATEN.split_with_sizes.default, ATEN.chunk.default,
    ATEN.unbind.int, ATEN.slice.Tensor, ATEN.select.int, ATEN.narrow.default, ATEN.cat.default,
    ATEN.stack.default, ATEN.repeat.default, ATEN.repeat_interleave.self_int,
    ATEN.broadcast_to.default, ATEN.movedim.int, ATEN.swapaxes.default, ATEN.matrix_H.default,
    ATEN.mT.default, ATEN.numpy_T.default,
}  # fmt: skip
_PRODUCTS = {
    ATEN.linear.default, ATEN.matmul.default, ATEN.mm.default, ATEN.bmm.default,
    ATEN.einsum.default, ATEN.mul.Tensor, ATEN.mul.Scalar, ATEN.div.Tensor, ATEN.div.Scalar,
    ATEN.neg.default, ATEN.add.Tensor, ATEN.sub.Tensor, ATEN.addmm.default,
}  # fmt: skip
_LINEAR_ERROR = 1e-4


@dataclass(frozen=True)
class Latent:
    """What one attention caches and how its keys and values follow from it.

    `rows`: the values of the cut; one after the other they are a row of `width` numbers a token.
    `latent` and `rope_key`: places in that row. `columns`: for each column of the key, as N + R
    order asks, its place in the query, and `factors` on them.
    """

    rows: tuple[fx.Node, ...]
    latent: tuple[int, ...]
    rope_key: tuple[int, ...]
    columns: tuple[int, ...]
    factors: tuple[float, ...]
    w_kv_b: torch.Tensor  # [H*(N+V), L]
    heads: int
    nope: int
    value: int
    value_bias_HV: torch.Tensor | None = None

    @property
    def rope(self) -> int:
        return len(self.rope_key)

    @property
    def rank(self) -> int:
        """L, the width of the latent."""
        return len(self.latent)


def latent_of(graph: UserGraph, site: Site) -> Latent:
    """The latent of an attention.

    Raises: InputError SRC-NO-LATENT (nothing narrower than keys and values), SRC-RAISE.
    """
    if site.value is None:
        return _seam(graph, site)
    operands = [*(score.key for score in site.scores), site.value]
    region = _linear_region(graph, [operand.node for operand in operands])
    rows = _narrowest(graph, site, [operand.node for operand in operands], region)
    width = sum(graph.elements(node) or 0 for node in rows)
    made = _made(graph, site, rows, operands)
    heads = max(_heads(graph, site), *(matrix.shape[0] for matrix, _ in made))
    key_HEW = torch.cat([matrix.expand(heads, -1, -1) for matrix, _ in made[:-1]], dim=1)
    value_HVW, bias_HV = (part.expand(heads, *part.shape[1:]) for part in made[-1])
    expanded = heads * (key_HEW.shape[1] + value_HVW.shape[1])
    if width >= expanded:
        raise InputError(
            "SRC-NO-LATENT",
            f"attention {site.index} keeps {expanded} numbers a token as keys and values, and the "
            f"narrowest that they are made from is {width}: there is no latent",
            hint="`mla-deploy compress` will turn such a model into an MLA one; it is not there "
            "yet",
            attention=site.index,
        )
    found = _canonical(site, rows, key_HEW, value_HVW)
    return replace(found, value_bias_HV=bias_HV.clone()) if bool(bias_HV.any()) else found


def _seam(graph: UserGraph, site: Site) -> Latent:
    query, latent, rope_key, w_kv_b = site.seam
    heads, width = (graph.axes(query)[axis] for axis in (1, -1))
    rank, rope = graph.axes(latent)[-1], graph.axes(rope_key)[-1]
    sizes = [size for size in (heads, width, rank, rope) if isinstance(size, int)]
    if len(sizes) < 4 or w_kv_b in graph.from_tokens:
        raise InputError("SRC-RAISE", f"attention {site.index}: sizes that are not fixed")
    count, wide, kept, turned = sizes
    weight = Values(graph, graph.weight, sizes=(1, 1)).of(w_kv_b).detach()
    nope = wide - turned
    return Latent(
        rows=(latent, rope_key),
        latent=tuple(range(kept)),
        rope_key=tuple(range(kept, kept + turned)),
        columns=tuple(range(wide)),
        factors=(1.0,) * wide,
        w_kv_b=weight,
        heads=count,
        nope=nope,
        value=weight.shape[0] // count - nope,
    )


def _heads(graph: UserGraph, site: Site) -> int:
    """Heads of the query."""
    query = site.scores[0].query
    for letter, size in zip(query.axes, query.node.meta["val"].shape, strict=True):
        if letter == "X":
            return int(size.node.expr / graph.rows)
        if letter == "H":
            return int(size)
    return 1


def _linear_region(graph: UserGraph, ends: Sequence[fx.Node]) -> set[fx.Node]:
    """Nodes up to `ends` that are linear, but for a bias, in the tokens' values before them."""
    found: set[fx.Node] = set()
    waiting = list(ends)
    while waiting:
        node = waiting.pop()
        if node in found or not _is_linear(graph, node):
            continue
        found.add(node)
        waiting.extend(parent for parent in node.all_input_nodes if parent in graph.from_tokens)
    return found


def _is_linear(graph: UserGraph, node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if getattr(node.target, "__name__", "") == "getitem":
        return True
    parents = node.all_input_nodes
    if any(graph.is_table(parent) for parent in parents):
        return False  # positions enter
    if node.target in _MOVES:
        return node.target is not ATEN.slice.Tensor or _keeps_tokens(graph, node)
    variable = [parent for parent in parents if parent in graph.from_tokens]
    if node.target in (ATEN.div.Tensor, ATEN.linear.default, ATEN.sub.Tensor):
        return variable == [node.args[0]]
    return node.target in _PRODUCTS and len(variable) == 1


def _keeps_tokens(graph: UserGraph, node: fx.Node) -> bool:
    """A slice along another axis than tokens, or one of all tokens."""
    parent: Any = node.args[0]
    return graph.axes(parent).count("S") == graph.axes(node).count("S")


def _narrowest(
    graph: UserGraph, site: Site, ends: Sequence[fx.Node], region: set[fx.Node]
) -> tuple[fx.Node, ...]:
    """The minimum cut, nearest to `ends`: networkx gives the one nearest to where the flow goes."""
    network = networkx.DiGraph()
    waiting, seen = list(ends), set(ends)
    for node in ends:
        network.add_edge((node, 1), "ends", capacity=inf)
    while waiting:
        node = waiting.pop()
        value = node.meta.get("val")
        width = graph.elements(node) if isinstance(value, torch.Tensor) else None
        network.add_edge((node, 0), (node, 1), capacity=inf if width is None else width)
        if node not in region:
            network.add_edge("sources", (node, 0), capacity=inf)
            continue
        for parent in node.all_input_nodes:
            if parent in graph.from_tokens:
                network.add_edge((parent, 1), (node, 0), capacity=inf)
                if parent not in seen:
                    seen.add(parent)
                    waiting.append(parent)
    try:
        _, (far, _) = networkx.minimum_cut(network, "sources", "ends")
    except networkx.NetworkXUnbounded:
        raise InputError(
            "SRC-RAISE",
            f"attention {site.index}: keys and values cannot be remade from one row a token",
            hint="keep rows and tokens as axes of their own between the latent and the attention",
            attention=site.index,
        ) from None
    cut = [node for node in seen if (node, 0) in far and (node, 1) not in far]
    order = {node: place for place, node in enumerate(graph.nodes)}
    # The latent first: it is wider than the rope key. Equal ones as the module computes them.
    return tuple(sorted(cut, key=lambda node: (-(graph.elements(node) or 0), order[node])))


def _made(
    graph: UserGraph, site: Site, rows: tuple[fx.Node, ...], operands: Sequence[Operand]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each operand as a matrix [H or 1, its width, W] from a row of the cut, and its bias."""
    widths = [graph.elements(node) or 0 for node in rows]
    width = sum(widths)
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    probe_TW = torch.cat((torch.eye(width), torch.zeros(1, width), torch.randn(3, width)))
    torch.random.set_rng_state(torch_state)
    tokens = probe_TW.shape[0]
    given = {
        node: placed_rows(graph, node, part[None])
        for node, part in zip(rows, probe_TW.split(widths, dim=1), strict=True)
    }
    values = Values(graph, graph.weight, sizes=(1, tokens), given=given)
    found = []
    for operand in operands:
        last = "V" if operand is operands[-1] else "E"
        made_HTE = as_heads(values.of(operand.node).detach(), operand.axes, f"BHT{last}", 1)[0]
        bias_HE = made_HTE[:, width]
        matrix_HEW = (made_HTE[:, :width] - bias_HE[:, None]).transpose(1, 2)
        asked = made_HTE[:, width + 1 :]
        wanted = probe_TW[width + 1 :] @ matrix_HEW.transpose(1, 2) + bias_HE[:, None]
        limit = _LINEAR_ERROR * (1 + float(wanted.abs().max()))
        if not float((asked - wanted).abs().max()) <= limit:
            raise InputError(
                "SRC-RAISE",
                f"attention {site.index}: {operand.node.name} is not linear in the latent",
                attention=site.index,
            )
        found.append((matrix_HEW, bias_HE))
    return found


def placed_rows(graph: UserGraph, node: fx.Node, rows_BSW: torch.Tensor) -> torch.Tensor:
    """Rows [B, S, W] in the axes of `node`."""
    axes = graph.axes(node)
    sizes = [size for size in axes if isinstance(size, int)]
    value = rows_BSW.reshape(*rows_BSW.shape[:2], *sizes)
    rest = iter(range(2, value.dim()))
    return value.permute([{"B": 0, "S": 1}[a] if isinstance(a, str) else next(rest) for a in axes])


def taken_rows(graph: UserGraph, node: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """The value of `node` as rows [B, S, W]."""
    axes = graph.axes(node)
    rest = [place for place, axis in enumerate(axes) if isinstance(axis, int)]
    rows = value.permute([axes.index("B"), axes.index("S"), *rest])
    return rows.reshape(*rows.shape[:2], graph.elements(node) or 0)


def as_heads(value: torch.Tensor, axes: str, wanted: str, batch: Any) -> torch.Tensor:
    """A value with its axes in the order of `wanted`; a missing head axis has size 1.

    X is rows and heads in one axis, rows outside.
    """
    if "X" in axes:
        place = axes.index("X")
        heads = value.shape[place] // batch
        shape = [*value.shape[:place], batch, heads, *value.shape[place + 1 :]]
        value = value.reshape(shape)
        axes = axes.replace("X", "BH")
    if "H" not in axes:
        value, axes = value[None], f"H{axes}"
    return value.permute([axes.index(letter) for letter in wanted])


def _canonical(
    site: Site, rows: tuple[fx.Node, ...], key_HEW: torch.Tensor, value_HVW: torch.Tensor
) -> Latent:
    """Tell the rope key from the latent, and the key's columns that read the one or the other."""
    used_by_key_EW = (key_HEW != 0).any(dim=0)
    used_by_value_W = (value_HVW != 0).any(dim=0).any(dim=0)
    same_EW = (key_HEW == key_HEW[:1]).all(dim=0)
    # A column of the key that copies one place of the row, for every head alike.
    copies_E = (used_by_key_EW.sum(dim=1) == 1) & same_EW.all(dim=1)
    shared_W = used_by_key_EW.any(dim=0) & ~used_by_value_W
    shared_W &= ~(used_by_key_EW & ~copies_E[:, None]).any(dim=0)
    rope_key = [int(place) for place in shared_W.nonzero()[:, 0]]
    turned_E = copies_E & used_by_key_EW[:, shared_W].any(dim=1)
    columns = [int(c) for c in (used_by_key_EW.any(dim=1) & ~turned_E).nonzero()[:, 0]]
    nope, factors = len(columns), [1.0] * len(columns)
    for place in rope_key:
        copying = [int(c) for c in used_by_key_EW[:, place].nonzero()[:, 0]]
        if len(copying) != 1:
            raise InputError(
                "SRC-RAISE",
                f"attention {site.index}: place {place} of the rope key stands in "
                f"{len(copying)} columns of the keys, wanted one",
                attention=site.index,
            )
        columns.append(copying[0])
        factors.append(float(key_HEW[0, copying[0], place]))
    used_W = used_by_key_EW.any(dim=0) | used_by_value_W
    latent = [int(place) for place in (used_W & ~shared_W).nonzero()[:, 0]]
    if not latent or not nope:
        raise InputError(
            "SRC-NO-LATENT",
            f"attention {site.index}: its keys share one vector without any latent part",
            attention=site.index,
        )
    w_HKL = torch.cat((key_HEW[:, columns[:nope]][..., latent], value_HVW[..., latent]), dim=1)
    return Latent(
        rows=rows,
        latent=tuple(latent),
        rope_key=tuple(rope_key),
        columns=tuple(columns),
        factors=tuple(factors),
        w_kv_b=w_HKL.flatten(0, 1).contiguous(),
        heads=key_HEW.shape[0],
        nope=nope,
        value=value_HVW.shape[1],
    )
