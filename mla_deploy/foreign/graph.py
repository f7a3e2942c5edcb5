"""A foreign language-model graph: the part each input plays, and what its values depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import onnx_ir as ir

from mla_deploy.errors import InputError, quoted
from mla_deploy.foreign.sizes import UNBOUNDED, Known, Shape, known_values

# Sizes that no axis of a model has, far enough apart that their sums and products are told apart.
ROWS, NEW, PAST = 10007, 100003, 1000003
_TOKEN_NAMES = ("input_ids", "token_ids", "ids", "tokens")
_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)
# What gives each token another value by its place alone.
_COUNTS = {"Range", "CumSum", "NonZero", "Trilu", "EyeLike"}


@dataclass(frozen=True)
class Sizes:
    """Rows, new tokens, and tokens cached before the call."""

    rows: int
    new: int
    past: int


@dataclass(frozen=True)
class ForeignGraph:
    """A graph from token ids [B, S] to logits, with what else it takes."""

    model: ir.Model
    ids: ir.Value
    positions: tuple[ir.Value, ...]
    masks: tuple[ir.Value, ...]
    caches: tuple[ir.Value, ...]
    logits: ir.Value
    known: Known
    from_ids: frozenset[ir.Value]  # what the tokens decide
    from_cache: frozenset[ir.Value]  # what earlier tokens decide
    positional: frozenset[ir.Value]  # what places or a given mask decide, the tokens left aside

    @property
    def token(self) -> str:
        """The letter of the axis of all tokens: T, or S where nothing is cached."""
        return "T" if self.caches else "S"

    def axes(self, value: ir.Value) -> tuple[str | int, ...] | None:
        """Of each axis B, S, P, T, its size, or "B?" where rows are merged with another axis."""
        shape = self.known.shapes.get(value)
        if shape is None:
            return None
        axes = tuple(_letter(size) for size in shape)
        is_one = not self.has_rows and self.depends(value) and axes[:1] == (1,)
        return ("B", *axes[1:]) if is_one and {"S", "T", "P"} & set(axes) else axes

    def elements(self, value: ir.Value) -> int | None:
        """Values a new token; None where a value has not one row for each of them."""
        axes = self.axes(value)
        if axes is None or axes.count("S") != 1 or axes.count("B") > 1:
            return None
        found = 1
        for axis in axes:
            if isinstance(axis, str) and axis not in ("B", "S"):
                return None
            found *= axis if isinstance(axis, int) else 1
        return found if "B" in axes or not self.has_rows else None

    @cached_property
    def has_rows(self) -> bool:
        """Whether the number of rows is free; else there is one, and its axis is called B too."""
        return self.known.shapes[self.ids][0] == ROWS

    @cached_property
    def most_tokens(self) -> int | None:
        """The rows of the shortest table that positions are looked up in, None without any."""
        found: list[int] = []
        for node in self.model.graph:
            if node.op_type not in ("Gather", "Slice") or node.outputs[0] not in self.positional:
                continue
            table = node.inputs[0]
            if table is not None and table not in self.positional and table in self.known.shapes:
                shape = self.known.shapes[table]
                found.extend(shape[axis] for axis in self._looked_up(node, len(shape)))
        return min(found, default=None)

    def _looked_up(self, node: ir.Node, rank: int) -> list[int]:
        """Axes of a table along which so many rows are taken as there are tokens."""
        if node.op_type == "Gather":
            return [node.attributes.get_int("axis", 0)]
        places = [self.known.values.get(v) if v is not None else None for v in node.inputs[1:4]]
        ends = places[1] if len(places) > 1 else None
        if ends is None:  # computed of what is not known here
            return [0]
        axes = places[2] if len(places) > 2 and places[2] is not None else np.arange(ends.size)
        cut = zip(axes.reshape(-1), ends.reshape(-1), strict=False)
        return [int(axis) % rank for axis, end in cut if NEW <= end < UNBOUNDED]

    def depends(self, value: ir.Value) -> bool:
        """Whether tokens, new or cached, decide a value."""
        return value in self.from_ids or value in self.from_cache

    def input_shapes(self, sizes: Sizes) -> dict[ir.Value, Shape]:
        """The shapes of the inputs with other sizes."""
        return {value: self.shape(value, sizes) or () for value in self.model.graph.inputs}

    def shape(self, value: ir.Value, sizes: Sizes) -> Shape | None:
        """The shape of a value with other sizes."""
        shape = self.known.shapes.get(value)
        return None if shape is None else tuple(resized(size, sizes) for size in shape)

    def mask_feed(self, mask: ir.Value, sizes: Sizes) -> np.ndarray:
        """A mask that hides nothing but the future, in the form that the graph takes."""
        shape = self.input_shapes(sizes)[mask]
        dtype = (mask.dtype or ir.DataType.INT64).numpy()
        if len(shape) < 3:
            return np.ones(shape, dtype=dtype)
        total = sizes.past + sizes.new
        seen_ST = np.arange(total) <= np.arange(sizes.past, total)[:, None]
        if dtype.kind == "f":
            hidden = np.where(seen_ST, 0, np.finfo(dtype).min).astype(dtype)
            return np.broadcast_to(hidden, shape).copy()
        return np.broadcast_to(seen_ST.astype(dtype), shape).copy()

    def position_feed(self, positions: ir.Value, sizes: Sizes) -> np.ndarray:
        """The places of the new tokens."""
        shape = self.input_shapes(sizes)[positions]
        dtype = (positions.dtype or ir.DataType.INT64).numpy()
        counted = np.arange(sizes.past, sizes.past + sizes.new, dtype=dtype)
        return np.broadcast_to(counted, shape).copy()


def foreign_graph(model: ir.Model) -> ForeignGraph:
    """Tell the inputs apart and follow what depends on what.

    Raises: InputError REW-INPUT (an input or output that is not known here), REW-FIXED (rows or
    tokens are a fixed number).
    """
    inputs = list(model.graph.inputs)
    ids = _ids(model, inputs)
    rest = [value for value in inputs if value is not ids]
    positions = tuple(v for v in rest if "position" in str(v.name) and v.dtype in _INTEGERS)
    masks = tuple(v for v in rest if "mask" in str(v.name) and v not in positions)
    caches = tuple(v for v in rest if v not in (*positions, *masks) and _is_cache(v))
    for value in rest:
        if value not in (*positions, *masks, *caches):
            raise _unknown_input(value)
    shapes = _input_shapes(ids, positions, masks, caches)
    known = known_values(model, shapes)
    from_ids, from_cache = _reached(model, [ids]), _reached(model, caches)
    graph = ForeignGraph(
        model=model,
        ids=ids,
        positions=positions,
        masks=masks,
        caches=caches,
        logits=ids,
        known=known,
        from_ids=from_ids,
        from_cache=from_cache,
        positional=_positional(model, known, (*positions, *masks), from_ids | from_cache),
    )
    return replace(graph, logits=_logits(graph))


def _ids(model: ir.Model, inputs: Sequence[ir.Value]) -> ir.Value:
    integers = [value for value in inputs if value.dtype in _INTEGERS]
    named = [value for value in integers if value.name in _TOKEN_NAMES]
    embedded = [
        value
        for value in integers
        if any(_is_embedding(node, place) for node, place in value.uses())
        and "position" not in str(value.name)
    ]
    for found in (named, embedded):
        if len(found) == 1:
            return found[0]
    names = ", ".join(quoted(value.name) for value in inputs) or "none"
    raise InputError(
        "REW-INPUT",
        f"the graph has inputs {names}; wanted one of token ids, gathered from an embedding",
        hint="name the token input `input_ids`; a graph that takes embeddings cannot be rewritten",
    )


def _is_embedding(node: ir.Node, place: int) -> bool:
    table = node.inputs[0]
    return (
        node.op_type == "Gather"
        and place == 1
        and table is not None
        and table.const_value is not None
        and len(table.const_value.shape) == 2
    )


def _is_cache(value: ir.Value) -> bool:
    floats = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    return value.dtype in floats and value.shape is not None and len(value.shape) in (3, 4)


def _unknown_input(value: ir.Value) -> InputError:
    return InputError(
        "REW-INPUT",
        f"input {quoted(value.name)} ({value.dtype}, {quoted(value.shape)}) is not known; wanted "
        "token ids, positions, masks and caches only",
        hint="export the model as token ids to logits, with or without past keys and values",
        input=str(value.name),
    )


def _input_shapes(
    ids: ir.Value,
    positions: Sequence[ir.Value],
    masks: Sequence[ir.Value],
    caches: Sequence[ir.Value],
) -> dict[ir.Value, Shape]:
    """A number for each axis: a word means what the token input says, or else what its place is."""
    if ids.shape is None or len(ids.shape) != 2:
        raise InputError("REW-INPUT", f"token ids are {quoted(ids.shape)}; wanted [batch, tokens]")
    words: dict[str, int] = {}
    for place, size in enumerate((ROWS, NEW)):
        word = _word(ids, place)
        if isinstance(word, str):
            words.setdefault(word, size)
    rows = _word(ids, 0)
    if isinstance(rows, int) and rows != 1:
        raise InputError(
            "REW-FIXED",
            f"the graph takes {rows} rows and no other number",
            hint="export it with a dynamic batch axis, or with one row",
        )
    if isinstance(_word(ids, 1), int):
        raise InputError(
            "REW-FIXED",
            f"the graph takes {_word(ids, 1)} new tokens and no other number",
            hint="export it with a dynamic sequence axis",
        )
    total = PAST + NEW if caches else NEW
    shapes = {ids: _numbers(ids, words, (ROWS, NEW))}
    for value in positions:
        shapes[value] = _numbers(value, words, (ROWS, NEW)[-len(value.shape or ()) :])
    for value in caches:
        inner = (PAST,) if len(value.shape or ()) == 3 else (PAST, PAST)
        shapes[value] = _numbers(value, words, (ROWS, *inner, 0))
    for value in masks:
        rank = len(value.shape or ())
        shapes[value] = _numbers(value, words, (ROWS, *[NEW] * (rank - 2), total)[-rank:])
    return shapes


def _word(value: ir.Value, place: int) -> int | str:
    """The size of an axis, or its word; "" where it has none. A number may be written as a word."""
    size = value.shape[place] if value.shape is not None else None
    if isinstance(size, int):
        return size
    word = str(size.value or "") if size is not None else ""
    return int(word) if word.isdecimal() else word


def _numbers(value: ir.Value, words: dict[str, int], by_place: Sequence[int]) -> Shape:
    shape = []
    for place, size in enumerate(by_place):
        word = _word(value, place)
        if isinstance(word, str):
            if word not in words and size == 0:
                raise InputError(
                    "REW-FIXED",
                    f"axis {place} of input {quoted(value.name)} is not a number",
                    hint="export the model with fixed head widths",
                )
            word = words.get(word, size)
        shape.append(word)
    return tuple(shape)


def _letter(size: int) -> str | int:
    named = {ROWS: "B", NEW: "S", PAST: "P", PAST + NEW: "T"}
    if size in named:
        return named[size]
    return "B?" if size > ROWS and size % ROWS == 0 else size


def resized(size: int, sizes: Sizes) -> int:
    """What a size becomes with other numbers of rows and tokens."""
    for base, number in (
        (PAST + NEW, sizes.past + sizes.new),
        (PAST, sizes.past),
        (NEW, sizes.new),
    ):
        if abs(size - base) < ROWS // 2:
            return number + size - base
    for base, number in ((ROWS, sizes.rows), (NEW, sizes.new), (PAST, sizes.past)):
        if size >= base and size % base == 0:
            return number * resized(size // base, sizes)
    return size


def _reached(model: ir.Model, starts: Sequence[ir.Value]) -> frozenset[ir.Value]:
    """Values that follow from `starts`; a size that is read off a value does not."""
    found = set(starts)
    for node in model.graph:
        if node.op_type in ("Shape", "Size") and node.domain == "":
            continue
        # CastLike takes a dtype from its second operand, and no value.
        inputs = node.inputs[:1] if node.op_type == "CastLike" else node.inputs
        if any(value in found for value in inputs if value is not None) or (
            found and _reads_inside(node, found)
        ):
            found.update(node.outputs)
    return frozenset(found)


def _reads_inside(node: ir.Node, found: set[ir.Value]) -> bool:
    """Whether a subgraph of the node reads one of the values."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in ir.traversal.RecursiveGraphIterator(attribute.as_graph()):
                if any(value in found for value in inner.inputs if value is not None):
                    return True
    return False


def _positional(
    model: ir.Model, known: Known, starts: Sequence[ir.Value], variable: frozenset[ir.Value]
) -> frozenset[ir.Value]:
    """What depends on where a token stands, and on no token."""
    found = set(starts)
    for node in model.graph:
        if any(value in variable for value in node.outputs):
            continue
        grows = any(_is_long(known, value) for value in node.outputs)
        # Slice: rows of a table for so many tokens.
        cut = node.op_type == "Slice" and grows and not _is_long(known, node.inputs[0])
        counts = node.op_type in _COUNTS and grows
        if node.op_type in ("Shape", "Size"):
            continue
        if counts or cut or any(v in found for v in node.inputs if v is not None):
            found.update(node.outputs)
    return frozenset(found)


def _is_long(known: Known, value: ir.Value | None) -> bool:
    """Whether a value has an axis that grows with the tokens, or a shape that cannot be told."""
    shape = known.shapes.get(value) if value is not None else None
    return shape is None or any(size >= NEW for size in shape)


def _logits(graph: ForeignGraph) -> ir.Value:
    outputs = list(graph.model.graph.outputs)
    named = [value for value in outputs if value.name == "logits"]
    for value in named or outputs:
        axes = graph.axes(value) or ("",)
        is_wide = isinstance(axes[-1], int)
        if value in graph.from_ids and is_wide and axes[:-1] in (("B", "S"), (1, "S")):
            return value
    shown = ", ".join(f"{quoted(v.name)} {list(graph.axes(v) or ())}" for v in outputs[:3])
    raise InputError(
        "REW-INPUT",
        f"the graph gives {shown}; wanted logits [batch, tokens, vocabulary]",
        hint="export the model with the logits of every new token as first output",
    )
