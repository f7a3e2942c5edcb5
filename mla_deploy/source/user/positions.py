"""What depends on positions alone: causal masks, which the step plan replaces, and tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from mla_deploy.errors import InputError
from mla_deploy.source.product_letters import HIDDEN
from mla_deploy.source.user.attention import Mask, Site
from mla_deploy.source.user.graph import ATEN, UserGraph, Values, needed

# Two lengths: a mask that is causal for one of them by chance is not for the other.
_LENGTHS = (5, 12)
_FEW, _MOST_SQUARE, _MOST = 4, 8194, 1 << 17
# What a number does where it says how far a token sees.
_DECIDING = {
    "lt", "le", "gt", "ge", "eq", "sub", "add", "rsub", "triu", "tril", "floor_divide", "div",
    "remainder", "clamp",
}  # fmt: skip
# Operators that broadcast: a table may be one of their operands.
_ELEMENTWISE = {
    ATEN.add.Tensor, ATEN.sub.Tensor, ATEN.mul.Tensor, ATEN.div.Tensor, ATEN.where.self,
    ATEN.rsub.Tensor, ATEN.addcmul.default, ATEN.maximum.default, ATEN.minimum.default,
}  # fmt: skip


def require_causal(graph: UserGraph, site: Site) -> None:
    """Each new token must see itself and all tokens in front of it, and nothing else.

    Raises: InputError SRC-RAISE, which says who sees what.
    """
    for tokens in _lengths(graph, site):
        future_ST = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        hidden_ST = future_ST.clone() if site.is_causal else torch.zeros_like(future_ST)
        for mask in site.masks:
            hidden_ST |= _hidden(graph, mask, tokens)
        wrong = (hidden_ST != future_ST).nonzero()
        if len(wrong):
            new, cached = (int(place) for place in wrong[0])
            seen = "does not see" if hidden_ST[new, cached] else "sees"
            raise InputError(
                "SRC-RAISE",
                f"attention {site.index} is not causal: of {tokens} tokens, token {new} {seen} "
                f"token {cached}",
                hint="only causal attention over all tokens is known in a module; windows and "
                "two-way attention are not",
                attention=site.index,
            )


def _lengths(graph: UserGraph, site: Site) -> list[int]:
    """Numbers of tokens at which the masks are computed. Raises: InputError SRC-RAISE."""
    most = graph.most_tokens or _MOST
    masks = [mask.node for mask in site.masks]
    found = {*_LENGTHS, *(point + 2 for point in turning_points(graph, masks))}
    far = [n for n in turning_points(graph, masks, only_deciding=True) if n + 2 > _MOST_SQUARE]
    if far and far[0] < most:
        raise InputError(
            "SRC-RAISE",
            f"the mask of attention {site.index} may change at {far[0]} tokens; a mask of so many "
            "is not computed",
            hint="only causal attention over all tokens is known in a module",
            attention=site.index,
        )
    return sorted({min(each, most) for each in found if each <= _MOST_SQUARE})


def turning_points(
    graph: UserGraph, values: Sequence[fx.Node], *, only_deciding: bool = False
) -> list[int]:
    """Whole numbers above 1 that `values` are computed from, and rows of buffers, in order.

    Windows, chunks and switches of frequencies stand there as numbers of tokens.
    """
    found: set[int] = set()
    for node in needed(graph, list(values), {}):
        name = getattr(node.target, "__name__", "").partition(".")[0]
        if node.op == "placeholder" and not only_deciding and node in graph.weights:
            found.update(graph.weight(node).shape)
        elif node.op == "call_function" and (name in _DECIDING or not only_deciding):
            flat = pytree.tree_leaves((node.args, node.kwargs))
            numbers = [each for each in flat if isinstance(each, (int, float))]
            found.update(int(abs(each)) for each in numbers if abs(each) < _MOST)
    return sorted(number for number in found if number > 1)


def require_by_place(graph: UserGraph) -> None:
    """Tables must say of a place what they say of it among more tokens. Raises: SRC-RAISE."""
    read = {
        parent
        for node in graph.nodes
        if node in graph.from_tokens
        for parent in node.all_input_nodes
        if graph.is_table(parent) and graph.axes(parent).count("S") == 1
    }
    most = graph.most_tokens or _MOST
    for table in (node for node in graph.nodes if node in read):
        axis = graph.axes(table).index("S")
        few = _table(graph, table, min(_FEW, most))
        for point in turning_points(graph, [table]):
            if few.shape[axis] < point + 2 <= most:
                part = _table(graph, table, point + 2).narrow(axis, 0, few.shape[axis])
                if not torch.allclose(part.to(few.dtype), few, rtol=1e-5, atol=1e-5):
                    raise _switches(table, point)


def _table(graph: UserGraph, table: fx.Node, tokens: int) -> torch.Tensor:
    value: torch.Tensor = Values(graph, graph.weight, sizes=(1, tokens)).of(table)
    return value.float()


def _switches(table: fx.Node, tokens: int) -> InputError:
    return InputError(
        "SRC-RAISE",
        f"{table.name} says something else of the first positions where more than {tokens} tokens "
        "were met: it changes with the number of tokens",
        hint="frequencies that switch beyond a length cannot serve rows of different lengths",
        node=table.name,
    )


def _hidden(graph: UserGraph, mask: Mask, tokens: int) -> torch.Tensor:
    """bool [S, T]: what `mask` hides."""
    value = Values(graph, graph.weight, sizes=(1, tokens)).of(mask.node)
    new, cached = mask.axes
    rank = max(value.dim(), -new, -cached)
    value = value.reshape([1] * (rank - value.dim()) + list(value.shape))
    others = [axis for axis in range(rank) if axis not in (new + rank, cached + rank)]
    value = value.permute([*others, new + rank, cached + rank])
    if value[..., 0, 0].numel() != 1:
        raise InputError("SRC-RAISE", f"{mask.node.name} hides other tokens from other heads")
    plane = value.reshape(value.shape[-2:]).expand(tokens, tokens)
    if mask.form != "added":
        return plane if mask.form == "hidden" else ~plane
    between = (plane != 0) & (plane > HIDDEN)
    if bool(between.any()):
        raise InputError(
            "SRC-RAISE",
            f"{mask.node.name} adds {float(plane[between][0])} to a score, wanted 0 or -inf",
            hint="a bias by position (ALiBi, say) is not known in a module",
        )
    return plane < 0


def placed_table(
    graph: UserGraph, table: fx.Node, reader: fx.Node, value: torch.Tensor, sizes: tuple[Any, Any]
) -> torch.Tensor:
    """A table made for all positions [B*S] of a call, as `reader` reads it: with a row axis.

    `value` is `table` with its token axis B*S long. Raises: InputError SRC-RAISE.
    """
    axes, wanted = graph.axes(table), graph.axes(reader)
    place = axes.index("S") - len(axes) if axes.count("S") == 1 else 0
    if (
        reader.target not in _ELEMENTWISE
        or place == 0
        or -place > len(wanted)
        or wanted[place] != "S"
        or "B" not in wanted[:place]
        or any(axis not in (1, "B") for axis in axes[:place])
    ):
        raise InputError(
            "SRC-RAISE",
            f"{reader.target} ({reader.name}) reads positions ({table.name} {list(axes)}) in a way "
            "that is not known",
            hint="turn positions into values that are multiplied with or added to [B, ..., S, ...]",
            node=reader.name,
        )
    batch, tokens = sizes
    rank = len(wanted)
    # A complex table comes with one more axis, of pairs, behind the others.
    shape: list[Any] = [1] * (rank - len(axes)) + list(value.shape)
    shape[wanted.index("B")] = batch
    shape[rank + place] = tokens
    return value.reshape(shape)
