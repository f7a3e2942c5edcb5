"""Where a traced module attends: softmax over cached tokens, read back to its products.

    query . key  (* number) (+ query . key) (mask)  ->  softmax  ->  weights . value
    scaled_dot_product_attention(query, key, value)
    mla_deploy::latent_attention(query, latent, rope key, w_kv_b)

Products may be matmul, bmm or einsum, in any order of axes. Everything else on the way to the
softmax is refused by name. Axis letters: B rows, H heads (X: both in one), S new tokens, T cached
tokens, E what is summed over, V the value's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mla_deploy.errors import InputError
from mla_deploy.source.latent_attention import OPERATOR
from mla_deploy.source.product_letters import (
    HIDDEN,
    Letters,
    einsum_letters,
    matmul_letters,
    names_of_scores,
    names_of_values,
)
from mla_deploy.source.user.graph import ATEN, UserGraph, Values, needed

# The same values in the same axes.
SAME = {
    ATEN.to.dtype, ATEN.to.dtype_layout, ATEN._to_copy.default, ATEN.clone.default,
    ATEN.contiguous.default, ATEN.alias.default, ATEN.detach.default, ATEN.detach_.default,
    ATEN.dropout.default, ATEN.type_as.default, ATEN.lift_fresh_copy.default,
}  # fmt: skip
_VIEWS = {ATEN.view.default, ATEN.reshape.default, ATEN._unsafe_view.default}
_SOFTMAX = {ATEN.softmax.int, ATEN._softmax.default, ATEN._safe_softmax.default}
_CHECK = ATEN._assert_tensor_metadata.default  # a cast leaves one behind
_PRODUCTS = {ATEN.matmul.default, ATEN.bmm.default, ATEN.einsum.default}


@dataclass(frozen=True)
class Operand:
    """A value and the letters of its axes."""

    node: fx.Node
    axes: str


@dataclass(frozen=True)
class Score:
    """One product that scores are made of, times `factor`."""

    query: Operand
    key: Operand
    factor: float


@dataclass(frozen=True)
class Mask:
    """What hides tokens: `hides` where it is true, or where it is far below zero when added."""

    node: fx.Node
    form: str  # hidden | visible | added
    axes: tuple[int, int]  # of new and of cached tokens, counted from the end


@dataclass(frozen=True)
class Site:
    """One attention. `value` is None where the documented seam was called."""

    index: int
    scores: tuple[Score, ...]
    masks: tuple[Mask, ...]
    value: Operand | None
    out: fx.Node
    out_axes: str
    is_causal: bool = False  # by an argument, beside the masks
    seam: tuple[fx.Node, ...] = ()  # query, latent, rope key, w_kv_b


def attention_sites(graph: UserGraph) -> tuple[Site, ...]:
    """Every attention of the module, in order.

    Raises: InputError SRC-RAISE (which names the layer and the first operator not known here),
    SRC-NO-LATENT when there is none.
    """
    found: list[Site] = []
    for node in graph.nodes:
        if node.target is OPERATOR:
            found.append(_seam(node, len(found)))
        elif node.target is ATEN.scaled_dot_product_attention.default:
            found.append(_fused(graph, node, len(found)))
        elif node.target in _SOFTMAX and _is_over_tokens(graph, node):
            found.append(_spelled_out(graph, node, len(found)))
    if not found:
        raise InputError(
            "SRC-NO-LATENT",
            "the module has no attention: no softmax over tokens, no latent_attention call",
            hint="write attention as softmax(query . key) . value, or call "
            "mla_deploy.source.latent_attention",
        )
    return tuple(found)


def _is_over_tokens(graph: UserGraph, node: fx.Node) -> bool:
    axes = graph.axes(node)
    dim: Any = node.args[1]
    return axes[dim] == "S" and axes.count("S") == 2


def _seam(node: fx.Node, index: int) -> Site:
    query, latent, rope_key, w_kv_b, scale = (_argument(node, place) for place in range(5))
    score = Score(Operand(query, "BHSE"), Operand(latent, "BTE"), float(scale))
    return Site(index, (score,), (), None, node, "BHSV", True, (query, latent, rope_key, w_kv_b))


def _fused(graph: UserGraph, node: fx.Node, index: int) -> Site:
    query, key, value = (_argument(node, place) for place in range(3))
    mask, dropout, is_causal = (
        _argument(node, place, default) for place, default in ((3, None), (4, 0.0), (5, False))
    )
    axes = graph.axes(query)
    letters = {4: "BH", 3: "X" if axes[0] != "B" else "B"}.get(len(axes))
    width = axes[-1]
    if letters is None or not isinstance(width, int) or dropout or node.kwargs.get("enable_gqa"):
        raise _unknown(index, node, "with other than [B, H, S, E] operands, dropout or groups")
    scale = node.kwargs.get("scale")
    score = Score(
        Operand(query, f"{letters}SE"),
        Operand(key, f"{letters}TE"),
        width**-0.5 if scale is None else float(scale),  # type: ignore[arg-type]
    )
    masks: tuple[Mask, ...] = ()
    if mask is not None:
        added = mask.meta["val"].dtype != torch.bool
        masks = (Mask(mask, "added" if added else "visible", (-2, -1)),)
    values = Operand(value, f"{letters}TV")
    return Site(index, (score,), masks, values, node, f"{letters}SV", bool(is_causal))


def _spelled_out(graph: UserGraph, softmax: fx.Node, index: int) -> Site:
    dim: Any = softmax.args[1]
    axes = graph.axes(softmax)
    walk = _Walk(graph, index)
    walk.up(softmax.args[0], dim % len(axes), 1.0)
    if not walk.scores:
        raise _unknown(index, softmax, "over scores that no product of query and key makes")
    value, out, letters = _weighted(graph, softmax, dim % len(axes), index)
    return Site(index, tuple(walk.scores), tuple(walk.masks), value, out, letters)


class _Walk:
    """From the softmax back to the products, collecting factors and masks."""

    def __init__(self, graph: UserGraph, index: int) -> None:
        self.graph = graph
        self.index = index
        self.scores: list[Score] = []
        self.masks: list[Mask] = []

    def up(self, node: Any, cached: int, factor: float) -> None:
        """`cached` is the axis of cached tokens in `node`, counted from the front."""
        target = node.target
        if target in _PRODUCTS:
            query, key = _product(self.graph, node, cached, self.index)
            self.scores.append(Score(query, key, factor))
        elif target in SAME:
            self.up(node.args[0], cached, factor)
        elif target in _VIEWS and self._keeps_tokens(node):
            parent = node.args[0]
            self.up(parent, len(self.graph.axes(parent)) - 1, factor)
        elif target in (ATEN.transpose.int, ATEN.permute.default):
            self.up(node.args[0], _permutation(node)[cached], factor)
        elif target in (ATEN.mul.Tensor, ATEN.mul.Scalar, ATEN.div.Tensor, ATEN.div.Scalar):
            self._scaled(node, cached, factor, target in (ATEN.div.Tensor, ATEN.div.Scalar))
        elif target is ATEN.add.Tensor and node.kwargs.get("alpha", 1) == 1:
            for place in (0, 1):
                part = node.args[place]
                if not isinstance(part, fx.Node):
                    continue  # one number on every score changes nothing
                if part in self.graph.from_tokens:
                    self.up(part, cached, factor)
                else:
                    self._mask(node, part, "added", cached)
        elif target in (ATEN.masked_fill.Scalar, ATEN.masked_fill.Tensor):
            self._hidden(node, node.args[2])
            self.up(node.args[0], cached, factor)
            self._mask(node, node.args[1], "hidden", cached)
        elif target in (ATEN.where.self, ATEN.where.ScalarOther, ATEN.where.ScalarSelf):
            scores, other, form = node.args[1], node.args[2], "visible"
            if scores not in self.graph.from_tokens:
                scores, other, form = other, scores, "hidden"
            self._hidden(node, other)
            self.up(scores, cached, factor)
            self._mask(node, node.args[0], form, cached)
        else:
            raise _unknown(self.index, node, "on the way from the scores to their softmax")

    def _scaled(self, node: fx.Node, cached: int, factor: float, divides: bool) -> None:
        first, second = node.args[:2]
        if isinstance(second, fx.Node) and second in self.graph.from_tokens and not divides:
            first, second = second, first
        number = constant_number(self.graph, second)
        if number is None:
            raise _unknown(self.index, node, "by a value that is no plain number on the scores")
        self.up(first, cached, factor / number if divides else factor * number)

    def _hidden(self, node: fx.Node, other: Any) -> None:
        """What stands in for a hidden score must be far below every other one."""
        number = constant_number(self.graph, other)
        if number is None or not number <= HIDDEN:
            raise _unknown(self.index, node, f"with {number} for what is hidden, wanted -inf")

    def _mask(self, node: fx.Node, mask: Any, form: str, cached: int) -> None:
        if not isinstance(mask, fx.Node) or mask in self.graph.from_tokens:
            raise _unknown(self.index, node, "with a mask that depends on the tokens")
        axes = self.graph.axes(node)
        new = [i for i, axis in enumerate(axes) if axis == "S" and i != cached]
        if len(new) != 1:
            raise _unknown(self.index, node, "with a mask over other axes than tokens")
        self.masks.append(Mask(mask, form, (new[0] - len(axes), cached - len(axes))))

    def _keeps_tokens(self, node: fx.Node) -> bool:
        """A view that splits or joins rows and heads, in front of new and cached tokens."""
        before = self.graph.axes(node.args[0])  # type: ignore[arg-type]
        return self.graph.axes(node)[-2:] == ("S", "S") == before[-2:]


def _weighted(
    graph: UserGraph, softmax: fx.Node, cached: int, index: int
) -> tuple[Operand, fx.Node, str]:
    """The product of the softmax with the values: the values, the product, its letters."""
    node, axis = softmax, cached
    while True:
        users = [user for user in node.users if user.target is not _CHECK]
        if len(users) != 1:
            raise _unknown(index, node, f"read {len(users)} times, wanted once, as weights")
        user = users[0]
        if user.target in SAME:
            node = user
        elif user.target in _VIEWS and graph.axes(user)[-2:] == ("S", "S"):
            node, axis = user, len(graph.axes(user)) - 1
        elif user.target in (ATEN.transpose.int, ATEN.permute.default):
            node, axis = user, _permutation(user).index(axis)
        elif user.target in _PRODUCTS:
            break
        else:
            raise _unknown(index, user, "on the way from the softmax to the values")
    left, right, out = _letters(graph, user, index)
    operands = _operands(user)
    letters = (left, right) if operands[0] is node else (right, left)
    other = operands[1] if operands[0] is node else operands[0]
    names = names_of_values(*letters, out, graph.axes(node), axis)
    if names is None:
        raise _unknown(index, user, "that does not sum over the cached tokens")
    return (
        Operand(other, _named(graph, other, letters[1], names)),
        user,
        _named(graph, user, out, names),
    )


def _product(graph: UserGraph, node: fx.Node, cached: int, index: int) -> tuple[Operand, Operand]:
    """Query and key of a product whose axis `cached` is the cached tokens."""
    letters = _letters(graph, node, index)
    found = names_of_scores(letters, graph.axes(node), cached)
    if found is None:
        raise _unknown(index, node, "that is no product of one query and one key axis")
    is_key_first, names = found
    operands = list(zip(_operands(node), letters[:2], strict=True))
    (query, query_letters), (key, key_letters) = operands[::-1] if is_key_first else operands
    return (
        Operand(query, _named(graph, query, query_letters, names)),
        Operand(key, _named(graph, key, key_letters, names)),
    )


def _letters(graph: UserGraph, node: fx.Node, index: int) -> Letters:
    """Letters of the operands' axes and of the result's, as an einsum spells them."""
    if node.target is ATEN.einsum.default:
        found = einsum_letters(str(node.args[0]))
        if found is None:
            raise _unknown(index, node, f"{node.args[0]!r}, wanted two operands and '->'")
        return found
    ranks = [len(graph.axes(operand)) for operand in _operands(node)]
    if min(ranks) < 2:
        raise _unknown(index, node, "of a vector")
    return matmul_letters(ranks)


def _named(graph: UserGraph, node: fx.Node, letters: str, names: dict[str, str]) -> str:
    """Our letters for an einsum's: rows, heads and both in one are told by their sizes."""
    found = ""
    for letter, size in zip(letters, graph.axes(node), strict=True):
        found += names.get(letter) or {"B": "B", "B?": "X"}.get(str(size), "H")
    return found


def _operands(node: fx.Node) -> Sequence[fx.Node]:
    operands: Any = node.args[1] if node.target is ATEN.einsum.default else node.args[:2]
    return operands


def _permutation(node: fx.Node) -> list[int]:
    """For each axis of the result, the axis of the argument."""
    rank = node.meta["val"].dim()
    if node.target is ATEN.permute.default:
        order: Any = node.args[1]
        return [axis % rank for axis in order]
    first, second = (int(axis) % rank for axis in node.args[1:3])  # type: ignore[arg-type]
    found = list(range(rank))
    found[first], found[second] = second, first
    return found


def constant_number(graph: UserGraph, value: Any) -> float | None:
    """A number, or a value of one element that neither tokens nor sizes change; else None.

    A learned one is as constant as the weights.
    """
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, fx.Node) or value in graph.from_tokens or graph.has_tokens(value):
        return None
    parents = needed(graph, [value], {})
    if any(node.target is ATEN.sym_size.int for node in parents):
        return None
    found = Values(graph, graph.weight, sizes=(1, 1)).of(value)
    return float(found.item()) if found.numel() == 1 else None


def _argument(node: fx.Node, place: int, default: Any = None) -> Any:
    return node.args[place] if len(node.args) > place else default


def _unknown(index: int, node: fx.Node, reason: str) -> InputError:
    return InputError(
        "SRC-RAISE",
        f"attention {index}: {node.target} ({node.name}) {reason}",
        hint="write attention as softmax(query . key * scale + causal mask) . value, or call "
        "mla_deploy.source.latent_attention",
        attention=index,
        node=node.name,
    )
