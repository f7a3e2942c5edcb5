"""Operators that move and make values: views, slices, gathers, scatters, ranges, fills.

The same contract as `arithmetic.py`. A view is a value of its own here; what an in-place operator
does to other views of the same memory was looked after while recording.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import onnx_ir as ir
import torch

from mla_deploy.export.direct.arithmetic import Operator, Results
from mla_deploy.export.direct.graph import Builder, dims, torch_dtype
from mla_deploy.export.direct.record import NotDirect, Spec


def _same(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    value: ir.Value = a.self
    return value


def _cast(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    return g.cast(a.self, out[0].dtype)


def _view(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    return g.reshape(a.self, out[0].shape)


def _expand(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    """ONNX broadcasts both ways: an axis that keeps its length is asked for as 1."""
    before, after = dims(a.self), out[0].shape
    if before == after and None not in before:
        return _same(g, a, out)
    lead = (1,) * (len(after) - len(before))
    kept = [
        1 if old == new and old is not None else new
        for old, new in zip((*lead, *before), after, strict=True)
    ]
    return g.op("Expand", a.self, g.ints(kept))


def _slice(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    before = dims(a.self)
    if a.step == 1 and before == out[0].shape and None not in before:
        return _same(g, a, out)
    start = 0 if a.start is None else a.start
    end = torch.iinfo(torch.int64).max if a.end is None else a.end
    return g.op("Slice", a.self, *(g.ints([n]) for n in (start, end, a.dim, a.step)))


def _select(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    return g.op("Gather", a.self, g.scalar(a.index, torch.int64), axis=a.dim)


def _squeeze(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    before = dims(a.self)
    wanted = getattr(a, "dim", range(len(before)))
    axes = [wanted] if isinstance(wanted, int) else list(wanted)
    ones = [axis for axis in axes if before[axis] == 1]
    return g.op("Squeeze", a.self, g.ints(ones)) if ones else _same(g, a, out)


def _unsqueeze(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    axis = a.dim + len(out[0].shape) if a.dim < 0 else a.dim
    return g.op("Unsqueeze", a.self, g.ints([axis]))


def _transpose(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    axes = list(range(len(out[0].shape)))
    one, other = (getattr(a, "dim0", 0), getattr(a, "dim1", 1)) if axes else (0, 0)
    if len(axes) > 1:
        axes[one], axes[other] = axes[other], axes[one]
    return g.op("Transpose", a.self, perm=axes)


def _permute(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    return g.op("Transpose", a.self, perm=[axis % len(a.dims) for axis in a.dims])


def _cat(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    parts = [g.cast(part, out[0].dtype) for part in a.tensors if dims(part) != (0,)]
    return parts[0] if len(parts) == 1 else g.op("Concat", *parts, axis=a.dim)


def _stack(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    axis = g.ints([a.dim])
    parts = [g.op("Unsqueeze", g.cast(part, out[0].dtype), axis) for part in a.tensors]
    return g.op("Concat", *parts, axis=a.dim)


def _split(g: Builder, a: Any, out: Sequence[Spec]) -> Results:
    if len(out) == 1:
        return [a.self]
    lengths = g.ints([spec.shape[a.dim] for spec in out])
    return g.ops("Split", [a.self, lengths], {"axis": a.dim}, len(out))


def _unbind(g: Builder, a: Any, out: Sequence[Spec]) -> Results:
    return [
        g.op("Gather", a.self, g.scalar(place, torch.int64), axis=a.dim)
        for place in range(len(out))
    ]


def _pad(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    """PyTorch counts the axes from the last one, each with its two ends together."""
    rank = len(out[0].shape)
    before, after = [0] * rank, [0] * rank
    for place, (low, high) in enumerate(zip(a.pad[::2], a.pad[1::2], strict=True)):
        before[rank - 1 - place], after[rank - 1 - place] = low, high
    return g.op("Pad", a.self, g.ints([*before, *after]), g.scalar(a.value, out[0].dtype))


def _gather(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    return g.op("GatherElements", a.self, a.index, axis=a.dim)


def _rows(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    return g.op("Gather", a.weight, a.indices, axis=0)


def _index_select(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    return g.op("Gather", a.self, a.index, axis=a.dim)


def _index(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    """One tensor of integers among the axes."""
    given = [(axis, value) for axis, value in enumerate(a.indices) if value is not None]
    if len(given) != 1 or torch_dtype(given[0][1]) == torch.bool:
        raise NotDirect("an index that is not one tensor of integers")
    [(axis, index)] = given
    return g.op("Gather", a.self, index, axis=axis)


def _scatter(g: Builder, a: Any, out: Sequence[Spec], *, reduction: str = "none") -> ir.Value:
    dtype = out[0].dtype
    if hasattr(a, "src"):
        if dims(a.src) != dims(a.index) or None in dims(a.src):
            raise NotDirect("a scatter from a source that is wider than its index")
        values = g.cast(a.src, dtype)
    else:
        values = g.op("Expand", g.operand(a.value, dtype), _shape_of(g, a.index))
    return g.op("ScatterElements", a.self, a.index, values, axis=a.dim, reduction=reduction)


def _topk(g: Builder, a: Any, out: Sequence[Spec]) -> Results:
    attributes = {"axis": a.dim, "largest": int(a.largest), "sorted": int(a.sorted)}
    return g.ops("TopK", [a.self, g.ints([a.k])], attributes, 2)


def _range(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    bounds = (getattr(a, "start", 0), a.end, getattr(a, "step", 1))
    return g.op("Range", *(g.scalar(bound, out[0].dtype) for bound in bounds))


def _fill(value: Any, g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    """`value`, or the fill value that is asked for, in every place."""
    number = value if value is not None else getattr(a, "fill_value", getattr(a, "s", 0))
    filled, shape = g.scalar(number, out[0].dtype), out[0].shape
    if not shape:
        return filled
    like: ir.Value | None = getattr(a, "self", None)
    if like is not None and dims(like) == shape:
        return g.op("Expand", filled, _shape_of(g, like))
    return g.op("Expand", filled, g.ints(shape))


def _overwritten(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    source = g.cast(a.src, out[0].dtype)
    same = dims(a.src) == out[0].shape and None not in out[0].shape
    return source if same else g.op("Expand", source, g.ints(out[0].shape))


def _repeat(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    lead = len(a.repeats) - len(dims(a.self))
    value = g.op("Unsqueeze", a.self, g.ints(list(range(lead)))) if lead else a.self
    return g.op("Tile", value, g.ints(a.repeats))


def _shape_of(g: Builder, value: ir.Value) -> ir.Value:
    known = all(isinstance(size, int) for size in dims(value))
    return g.ints(dims(value)) if known else g.op("Shape", value)


LAYOUT: Mapping[str, Operator] = {
    **dict.fromkeys(
        ("aten.alias.default", "aten.clone.default", "aten.detach.default",
         "aten.lift_fresh.default", ),
        _same,
    ),
    **dict.fromkeys(
        ("aten.view.default", "aten._unsafe_view.default"), _view
    ),
    **dict.fromkeys(
        ("aten.squeeze.dim", "aten.squeeze.dims", "aten.squeeze.default"), _squeeze
    ),
    **dict.fromkeys(("aten.split.Tensor", "aten.split_with_sizes.default"), _split),
    **dict.fromkeys(("aten.arange.default",  "aten.arange.start_step"), _range),
    **dict.fromkeys(
        ("aten.zeros.default", "aten.zeros_like.default", "aten.new_zeros.default"),
        partial(_fill, 0),
    ),
    **dict.fromkeys(
        ("aten.ones.default", "aten.ones_like.default", "aten.new_ones.default"),
        partial(_fill, 1),
    ),
    **dict.fromkeys(
        ("aten.full.default", "aten.full_like.default", "aten.new_full.default",
         "aten.scalar_tensor.default"),
        partial(_fill, None),
    ),
    "aten._to_copy.default": _cast,
    "aten.expand.default": _expand,
    "aten.slice.Tensor": _slice,
    "aten.select.int": _select,
    "aten.unsqueeze.default": _unsqueeze,
    "aten.transpose.int": _transpose,
    "aten.t.default": _transpose,
    "aten.permute.default": _permute,
    "aten.cat.default": _cat,
    "aten.stack.default": _stack,
    "aten.unbind.int": _unbind,
    "aten.constant_pad_nd.default": _pad,
    "aten.gather.default": _gather,
    "aten.embedding.default": _rows,
    "aten.index_select.default": _index_select,
    "aten.index.Tensor": _index,
    "aten.scatter.src": _scatter,
    "aten.scatter.value": _scatter,
    "aten.scatter_add.default": partial(_scatter, reduction="add"),
    "aten.topk.default": _topk,
    "aten.copy.default": _overwritten,
    "aten.repeat.default": _repeat,
}  # fmt: skip
