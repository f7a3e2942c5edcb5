"""The promise as a check: in a decode graph only the latent carries the cached-token axis.

Every value's shape is inferred with the cached-token axis T set to a prime no other size has, one
row and one new token. What is left per cached token is then counted:

- a value that only moves cached rows (casts, slices, transposes) holds at most one row, L + R;
- any other value holds at most one number per head: scores and masks, never keys or values.

Of latents stored as codes, widening them is moving them. Where scales are cached beside them, a
query or a probability is two parts, and what stands for zero, repeated beside scales, is nothing
of a token.

An expanded key holds H x (N + R) per cached token, so a graph that was not absorbed is refused.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import onnx
import onnx_ir as ir
from onnx import inliner, shape_inference
from onnxscript import optimizer

from mla_deploy import shapes
from mla_deploy.errors import MlaDeployError
from mla_deploy.rewrite.plain_products import plain_products

_T = 10007
_DIMS = {
    shapes.BATCH: 1,
    shapes.NEW_TOKENS: 1,
    shapes.CAPACITY: _T,
    shapes.PAST_TOKENS: _T - 1,
    f"{shapes.PAST_TOKENS} + {shapes.NEW_TOKENS}": _T,
}
_MOVES = {
    "Cast",
    "Concat",
    "DequantizeLinear",
    "Gather",
    "GatherND",
    "Identity",
    "Pad",
    "Reshape",
    "ScatterND",
    "Slice",
    "Split",
    "Squeeze",
    "TensorScatter",
    "Transpose",
    "Unsqueeze",
    "Where",
}
# Codes times scales, less what stands for zero; nibbles apart; e4m3 numbers by their scales.
_WIDENS = {"BitShift", "BitwiseAnd", "Mul"}
_SCALES = ("latent_scale.", "rope_key_scale.")
_CACHE = ("latent_cache.", *_SCALES, "rope_key_cache.", "indexer_key_cache.")
_SMALL = 64  # elements of a constant that can be a shape


@dataclass(frozen=True)
class Violation:
    """A value that carries more per cached token than the promise allows."""

    value: str
    op_type: str
    per_token: int  # -1 when its shape could not be inferred
    allowed: int

    def __str__(self) -> str:
        held = "an unknown number" if self.per_token < 0 else str(self.per_token)
        return (
            f"{self.value} ({self.op_type}) holds {held} per cached token, allowed {self.allowed}"
        )


def require_latent_only(model: onnx.ModelProto, num_heads: int, row_width: int) -> None:
    """Raises: REW-EXPANDED naming up to ten values that break the promise."""
    found = latent_violations(model, num_heads, row_width)
    if found:
        raise MlaDeployError(
            "REW-EXPANDED",
            f"{len(found)} value(s) of the decode graph carry the cached-token axis with more than "
            f"the latent row; first: {found[0]}",
            hint="the projections were not absorbed everywhere; compare rewrite counts in the "
            "manifest with the number of layers",
            values=[str(v) for v in found[:10]],
        )


def latent_violations(model: onnx.ModelProto, num_heads: int, row_width: int) -> list[Violation]:
    """Every value that breaks the promise, in graph order. `model` is left as it is.

    Calls of one function with arguments of the same shapes hold the same values, so the first
    speaks for all: the check does not grow with depth.
    """
    flat = inliner.inline_local_functions(_first_calls(model))
    _set_sizes(flat)
    _forget_weights(flat)
    plain_products(flat.graph)
    # Shapes that hang on a Range or a Shape are known only once those are folded.
    folded = ir.from_proto(flat)
    optimizer.fold_constants(folded, onnx_shape_inference=True)
    _constants_inside(folded.graph)
    inferred = shape_inference.infer_shapes(ir.to_proto(folded), data_prop=True)
    if any(value.name.startswith(_SCALES) for value in inferred.graph.input):
        walk = _Walk(2 * num_heads, row_width, _MOVES | _WIDENS)
    else:
        walk = _Walk(num_heads, row_width, _MOVES)
    return walk.graph(inferred.graph, ChainMap(), set())


def _first_calls(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which a repeated call is gone; who reads from it reads from the first one."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    functions = {(f.domain, f.name) for f in copy.functions}
    dims = {t.name: tuple(t.dims) for t in graph.initializer}
    seen: dict[tuple[object, ...], onnx.NodeProto] = {}
    same: dict[str, str] = {}
    kept = []
    for node in graph.node:
        key = (
            node.domain,
            node.op_type,
            tuple(a.SerializeToString() for a in node.attribute),
            tuple(dims.get(name) for name in node.input),
        )
        if (node.domain, node.op_type) in functions and key in seen:
            same.update(zip(node.output, seen[key].output, strict=True))
            continue
        seen[key] = node
        kept.append(node)
    for node in kept:
        node.input[:] = [same.get(name, name) for name in node.input]
    outputs = [value for value in graph.output if value.name not in same]
    del graph.node[:], graph.output[:]
    graph.node.extend(kept)
    graph.output.extend(outputs)
    return copy


def _set_sizes(model: onnx.ModelProto) -> None:
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in _DIMS:
                dim.dim_value = _DIMS[dim.dim_param]
    known = [v for v in model.graph.value_info if not _has_words(v)]
    del model.graph.value_info[:]
    model.graph.value_info.extend(known)


def _has_words(value: onnx.ValueInfoProto) -> bool:
    """Whether a size is still a word: inference knows better when all around it is a number."""
    return any(dim.dim_param for dim in value.type.tensor_type.shape.dim)


def _forget_weights(model: onnx.ModelProto) -> None:
    """Only shapes matter here: a weight becomes an input, so that nothing looks for its bytes."""
    graph = model.graph
    weights = [t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    constants = [t for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    for tensor in weights:
        kind = graph.input.add(name=tensor.name).type.tensor_type
        kind.elem_type = tensor.data_type
        for size in tensor.dims:
            kind.shape.dim.add(dim_value=size)
    del graph.initializer[:]
    graph.initializer.extend(constants)


def _constants_inside(graph: ir.Graph) -> None:
    """Repeat small constants in the branches that read them: inference does not look outside."""
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                _repeat_constants(attribute.as_graph())
                _constants_inside(attribute.as_graph())


def _repeat_constants(branch: ir.Graph) -> None:
    for number, node in enumerate(list(branch)):
        for place, value in enumerate(node.inputs):
            if value is None or value.graph is branch:
                continue
            tensor = ir.convenience.get_const_tensor(value)
            if tensor is not None and tensor.size <= _SMALL:
                copy = ir.node("Constant", [], attributes={"value": tensor})
                copy.outputs[0].name = f"{branch.name}_constant_{number}_{place}"
                branch.insert_before(node, copy)
                node.replace_input_with(place, copy.outputs[0])


class _Walk:
    def __init__(self, num_heads: int, row_width: int, moves: set[str]) -> None:
        self.moves = moves
        self.num_heads = num_heads
        self.row_width = row_width

    def graph(
        self,
        graph: onnx.GraphProto,
        outer: ChainMap[str, tuple[int, ...]],
        moved: set[str],
    ) -> list[Violation]:
        """`outer` are the shapes of enclosing graphs; `moved` values are cached rows."""
        known = ChainMap(_shapes(graph), *outer.maps)
        moved.update(v.name for v in graph.input if v.name.startswith(_CACHE))
        found = [*self._inputs(graph, known)]
        for node in graph.node:
            reads = [n for n in node.input if n]
            subgraphs = list(_subgraphs(node))
            for sub in subgraphs:
                found.extend(self.graph(sub, known, moved))
            if node.op_type == "ConstantOfShape":
                continue
            is_move = node.op_type in self.moves and any(n in moved for n in reads)
            for name in filter(None, node.output):
                shape = known.get(name)
                if shape is None:
                    if any(_carries(known.get(n, ())) for n in reads) and not subgraphs:
                        found.append(Violation(name, node.op_type, -1, self.num_heads))
                    continue
                if not _carries(shape):
                    continue
                if is_move:
                    moved.add(name)
                allowed = self.row_width if is_move else self.num_heads
                per_token = prod(shape) // _T
                if per_token > allowed:
                    found.append(Violation(name, node.op_type, per_token, allowed))
        return found

    def _inputs(
        self, graph: onnx.GraphProto, known: ChainMap[str, tuple[int, ...]]
    ) -> Iterator[Violation]:
        for name in (v.name for v in graph.input):
            allowed = self.row_width if name.startswith(_CACHE) else self.num_heads
            shape = known.get(name, ())
            if _carries(shape) and prod(shape) // _T > allowed:
                yield Violation(name, "input", prod(shape) // _T, allowed)


def _shapes(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    found = {t.name: tuple(t.dims) for t in graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
            found[value.name] = tuple(d.dim_value for d in kind.shape.dim)
    return found


def _carries(shape: tuple[int, ...]) -> bool:
    return any(size and size % _T == 0 for size in shape)


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs
