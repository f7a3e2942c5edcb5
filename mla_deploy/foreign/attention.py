"""Where attention happens in a foreign graph: queries, keys, scale and mask, values, the result.

From a softmax over tokens back to the products that its scores are made of, and forward to the
product with the values; or an `Attention` operator. Nothing depends on how a node is called.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from mla_deploy.foreign.axes import Operand, named, permutation, product_letters
from mla_deploy.foreign.graph import NEW, ForeignGraph
from mla_deploy.foreign.stop import Stop
from mla_deploy.source.product_letters import HIDDEN, names_of_scores, names_of_values

# The same values in the same axes.
SAME = {"Identity", "Cast", "CastLike", "Dropout"}
VIEWS = {"Reshape", "Squeeze", "Unsqueeze", "Flatten"}
PRODUCTS = {"MatMul", "FusedMatMul", "Einsum"}


@dataclass(frozen=True)
class Score:
    """One product that scores are made of, times `factor`."""

    query: Operand
    key: Operand
    factor: float


@dataclass(frozen=True)
class Mask:
    """What hides tokens: `hides` where it is true, or where it is far below zero when added."""

    value: ir.Value
    form: str  # hidden | visible | added
    axes: tuple[int, int]  # of new and of cached tokens, counted from the end


@dataclass(frozen=True)
class Site:
    """One attention; `node` is its softmax or operator."""

    index: int
    node: ir.Node
    scores: tuple[Score, ...]
    masks: tuple[Mask, ...]
    value: Operand
    out: Operand
    is_causal: bool = False  # by an attribute, beside the masks
    groups: int = 1  # query heads that share a key head


def attention_nodes(graph: ForeignGraph) -> tuple[ir.Node, ...]:
    """Every softmax over tokens and every attention operator, in order."""
    return tuple(node for node in graph.model.graph if _is_attention(graph, node))


def _is_attention(graph: ForeignGraph, node: ir.Node) -> bool:
    if node.op_type in ("Attention", "MultiHeadAttention", "GroupQueryAttention"):
        return True
    if node.op_type != "Softmax":
        return False
    axes = graph.axes(node.outputs[0])
    if axes is None:
        return False
    axis = axes[node.attributes.get_int("axis", -1)]
    # More than all tokens: with scores of no token (sinks), which is for the walk to refuse.
    return axis == graph.token or (isinstance(axis, int) and axis >= NEW)


def attention_site(graph: ForeignGraph, node: ir.Node, index: int) -> Site:
    """The attention that `node` is the softmax or the operator of. Raises: Stop."""
    if node.op_type == "Softmax":
        return _spelled_out(graph, node, index)
    if node.domain != "":
        raise Stop("attention", node, f"operator {node.domain}.{node.op_type} is not known")
    return _operator(graph, node, index)


def _operator(graph: ForeignGraph, node: ir.Node, index: int) -> Site:
    """ai.onnx Attention; with past keys and values it joins them itself."""
    inputs = [*node.inputs, *[None] * (7 - len(node.inputs))]
    query, key, value, mask, _, _, lengths = inputs[:7]
    limits = [node.attributes.get_int(f"{side}_window_size", -1) for side in ("left", "right")]
    if query is None or key is None or value is None or lengths is not None:
        raise Stop("attention", node, "lengths of its own (nonpad_kv_seqlen) are not known")
    if node.attributes.get_float("softcap", 0.0) or max(limits) >= 0:
        raise Stop("attention", node, "with a soft cap or a window is not known")
    heads = [node.attributes.get_int(f"{side}_num_heads", 0) for side in ("q", "kv")]
    operands = [
        _operand(graph, node, each, f"{token}{width}", count)
        for each, token, width, count in (
            (query, "S", "E", heads[0]),
            (key, "T", "E", heads[1]),
            (value, "T", "V", heads[1]),
            (node.outputs[0], "S", "V", heads[0]),
        )
    ]
    wide = operands[0].width(graph)
    scale = node.attributes.get_float("scale", 0.0) or wide**-0.5
    masks = []
    if mask is not None:
        form = "visible" if graph.known.dtypes.get(mask) == ir.DataType.BOOL else "added"
        masks.append(Mask(mask, form, (-2, -1)))
    groups = operands[0].count(graph) // operands[1].count(graph)
    return Site(
        index=index,
        node=node,
        scores=(Score(operands[0], operands[1], scale),),
        masks=tuple(masks),
        value=operands[2],
        out=operands[3],
        is_causal=bool(node.attributes.get_int("is_causal", 0)),
        groups=groups,
    )


def _operand(graph: ForeignGraph, node: ir.Node, value: ir.Value, ends: str, heads: int) -> Operand:
    axes = graph.axes(value)
    if axes is None:
        raise Stop("attention", value, "its shape cannot be told")
    if len(axes) == 4:
        return Operand(value, f"BH{ends}")
    if len(axes) != 3 or not heads:
        raise Stop("attention", node, f"an operand is {list(axes)}, wanted three or four axes")
    return Operand(value, f"B{ends}", heads)


def _spelled_out(graph: ForeignGraph, softmax: ir.Node, index: int) -> Site:
    scores = softmax.inputs[0]
    axes = graph.axes(softmax.outputs[0])
    if scores is None or axes is None:
        raise Stop("scores", softmax, "its shape cannot be told")
    cached = softmax.attributes.get_int("axis", -1) % len(axes)
    walk = _Walk(graph)
    walk.up(scores, cached, 1.0)
    if not walk.scores:
        raise Stop("scores", softmax, "no product of queries and keys makes its scores")
    value, out = _weighted(graph, softmax, cached)
    return Site(index, softmax, tuple(walk.scores), tuple(walk.masks), value, out)


class _Walk:
    """From the softmax back to the products, collecting factors and masks."""

    def __init__(self, graph: ForeignGraph) -> None:
        self.graph = graph
        self.scores: list[Score] = []
        self.masks: list[Mask] = []

    def up(self, value: ir.Value, cached: int, factor: float) -> None:
        """`cached` is the axis of all tokens in `value`, counted from the front."""
        node = value.producer()
        if node is None:
            raise Stop("scores", value, "the scores come in from outside")
        op, inputs = node.op_type, [each for each in node.inputs if each is not None]
        if op in PRODUCTS:
            query, key = _product(self.graph, node, cached)
            self.scores.append(Score(query, key, factor * node.attributes.get_float("alpha", 1.0)))
        elif op in SAME:
            self.up(inputs[0], cached, factor)
        elif op in VIEWS and _keeps_tokens(self.graph, node):
            self.up(inputs[0], len(self.graph.axes(inputs[0]) or ()) - 1, factor)
        elif op == "Transpose":
            self.up(inputs[0], permutation(self.graph, node)[cached], factor)
        elif op in ("Mul", "Div"):
            self._scaled(node, cached, factor)
        elif op in ("Add", "Sum"):
            self._added(node, inputs, cached, factor)
        elif op == "Where":
            self._where(node, inputs, cached, factor)
        elif op == "Max":
            kept = [each for each in inputs if each in self.graph.from_ids]
            limits = [self.graph.known.scalar(each) for each in inputs if each not in kept]
            if len(kept) != 1 or any(limit is None or limit > HIDDEN for limit in limits):
                raise Stop("scores", node, "the scores are cut from below")
            self.up(kept[0], cached, factor)
        else:
            raise Stop("scores", node, "is not known on the way from the scores to their softmax")

    def _scaled(self, node: ir.Node, cached: int, factor: float) -> None:
        first, second = node.inputs[:2]
        if second in self.graph.from_ids and node.op_type == "Mul":
            first, second = second, first
        number = self.graph.known.scalar(second)
        if number is None or first is None:
            raise Stop("scale", node, "the scores are scaled by what is no plain number")
        self.up(first, cached, factor / number if node.op_type == "Div" else factor * number)

    def _added(self, node: ir.Node, parts: list[ir.Value], cached: int, factor: float) -> None:
        for part in parts:
            if part in self.graph.from_ids:
                self.up(part, cached, factor)
            elif self.graph.known.scalar(part) is None:  # one number on every score does nothing
                self._mask(node, part, "added", cached)

    def _where(self, node: ir.Node, inputs: list[ir.Value], cached: int, factor: float) -> None:
        condition, scores, other = inputs
        form = "visible"
        if scores not in self.graph.from_ids:
            scores, other, form = other, scores, "hidden"
        number = self.graph.known.scalar(other)
        if number is None or not number <= HIDDEN:
            raise Stop("mask", node, f"what is hidden scores {number}, wanted minus infinity")
        self.up(scores, cached, factor)
        self._mask(node, condition, form, cached)

    def _mask(self, node: ir.Node, mask: ir.Value, form: str, cached: int) -> None:
        if self.graph.depends(mask):
            raise Stop("mask", node, "the mask depends on the tokens")
        axes = self.graph.axes(node.outputs[0]) or ()
        new = [i for i, axis in enumerate(axes) if axis == "S" and i != cached]
        if len(new) != 1:
            raise Stop("mask", node, "the mask is over other axes than tokens")
        self.masks.append(Mask(mask, form, (new[0] - len(axes), cached - len(axes))))


def _keeps_tokens(graph: ForeignGraph, node: ir.Node) -> bool:
    """A view that splits or joins rows and heads, in front of new and cached tokens."""
    before = graph.axes(node.inputs[0]) if node.inputs[0] is not None else None
    after = graph.axes(node.outputs[0])
    tokens = ("S", graph.token)
    return before is not None and after is not None and before[-2:] == tokens == after[-2:]


def _weighted(graph: ForeignGraph, softmax: ir.Node, cached: int) -> tuple[Operand, Operand]:
    """The product of the softmax with the values: the values, and the product."""
    value, axis = softmax.outputs[0], cached
    while True:
        user = _only_user(graph, value)
        op = user.op_type
        if op in SAME or op == "Where":
            value = user.outputs[0]
        elif op in VIEWS and _keeps_tokens(graph, user):
            value = user.outputs[0]
            axis = len(graph.axes(value) or ()) - 1
        elif op == "Transpose":
            value, axis = user.outputs[0], permutation(graph, user).index(axis)
        elif op in PRODUCTS:
            break
        else:
            raise Stop("values", user, "is not known on the way from the softmax to the values")
    left, right, out = product_letters(graph, user)
    first, second = user.inputs[:2]
    letters, other = ((left, right), second) if first is value else ((right, left), first)
    names = names_of_values(*letters, out, graph.axes(value) or (), axis)
    if other is None or names is None:
        raise Stop("values", user, "does not sum over the tokens")
    return (
        Operand(other, named(graph, other, letters[1], names)),
        Operand(user.outputs[0], named(graph, user.outputs[0], out, names)),
    )


def _only_user(graph: ForeignGraph, value: ir.Value) -> ir.Node:
    """Who reads the weights. Where(IsNaN(w), 0, w) is w: a row that sees nothing does not occur."""
    users = [node for node, _ in value.uses()]
    checks = [node.outputs[0] for node in users if node.op_type == "IsNaN"]
    rest = [node for node in users if node.op_type != "IsNaN"]
    if len(checks) == 1 and len(rest) == 1 and rest[0].op_type == "Where":
        condition, zero, kept = rest[0].inputs
        if condition is checks[0] and kept is value and graph.known.scalar(zero) == 0:
            return rest[0]
    if len(users) != 1:
        raise Stop("values", value, f"the weights are read {len(users)} times, wanted once")
    return users[0]


def _product(graph: ForeignGraph, node: ir.Node, cached: int) -> tuple[Operand, Operand]:
    """Query and key of a product whose axis `cached` is that of all tokens."""
    letters = product_letters(graph, node)
    found = names_of_scores(letters, graph.axes(node.outputs[0]) or (), cached)
    first, second = node.inputs[:2]
    if first is None or second is None or found is None:
        raise Stop("scores", node, "is no product of one axis of queries and keys")
    is_key_first, names = found
    operands = [(first, letters[0]), (second, letters[1])]
    (query, query_letters), (key, key_letters) = operands[::-1] if is_key_first else operands
    return (
        Operand(query, named(graph, query, query_letters, names)),
        Operand(key, named(graph, key, key_letters, names)),
    )
