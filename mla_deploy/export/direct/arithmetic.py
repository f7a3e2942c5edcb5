"""Operators that compute: elementwise ones, comparisons, reductions, products, norms.

Each takes the builder, the call's arguments by PyTorch's names (tensors as graph values) and what
its results are, and gives the results. The forms are those that torch's own exporter writes, which
the rewrite rules know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import onnx_ir as ir
import torch

from mla_deploy.export.direct.graph import Builder, dims, torch_dtype
from mla_deploy.export.direct.record import NotDirect, Spec

Results = ir.Value | Sequence[ir.Value]
Operator = Callable[[Builder, Any, Sequence[Spec]], Results]


def _unary(op_type: str, g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    return g.op(op_type, g.cast(a.self, out[0].dtype))


def _binary(op_type: str, g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    dtype = out[0].dtype
    if dtype == torch.bool:
        raise NotDirect(f"{op_type} of truth values")
    if op_type in ("Mul", "Div") and a.other == 1 and not isinstance(a.other, ir.Value):
        return g.cast(a.self, dtype)
    other = g.operand(a.other, dtype)
    alpha = getattr(a, "alpha", 1)
    if alpha != 1:
        other = g.op("Mul", other, g.scalar(alpha, dtype))
    return g.op(op_type, g.cast(a.self, dtype), other)


def _compared(op_type: str, g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    dtype = _common_dtype(a.self, a.other)
    return g.op(op_type, g.cast(a.self, dtype), g.operand(a.other, dtype))


def _unequal(op_type: str, g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    return g.op("Not", _compared(op_type, g, a, out))


def _common_dtype(left: ir.Value, right: Any) -> torch.dtype:
    """What PyTorch compares in: a tensor without axes, or a number, counts for less."""

    def like(value: Any) -> Any:
        if not isinstance(value, ir.Value):
            return value if isinstance(value, (bool, int, float)) else 0  # a size is an integer
        return torch.empty((1,) * len(dims(value)), dtype=torch_dtype(value), device="meta")

    return torch.result_type(like(left), like(right))


def _logical(op_type: str, g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    dtype = out[0].dtype
    name = op_type if dtype == torch.bool else f"Bitwise{op_type}"
    return g.op(name, g.cast(a.self, dtype), g.operand(a.other, dtype))


def _negated(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    return g.op("Not" if out[0].dtype == torch.bool else "BitwiseNot", a.self)


def _power(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    dtype = out[0].dtype
    return g.op("Pow", g.operand(a.self, dtype), g.operand(a.exponent, dtype))


def _rsqrt(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    return g.op("Reciprocal", g.op("Sqrt", g.cast(a.self, out[0].dtype)))


def _silu(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    return g.op("Mul", a.self, g.op("Sigmoid", a.self))


def _gelu(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    return g.op("Gelu", a.self, approximate=a.approximate)


def _softplus(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    """Beyond the threshold PyTorch takes the line itself."""
    if a.beta != 1:
        raise NotDirect(f"softplus with beta {a.beta}")
    above = g.op("Greater", a.self, g.scalar(a.threshold, out[0].dtype))
    return g.op("Where", above, a.self, g.op("Softplus", a.self))


def _clamp(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    dtype = out[0].dtype
    low, high = (
        None if bound is None else g.operand(bound, dtype)
        for bound in (getattr(a, "min", None), getattr(a, "max", None))
    )
    given = [g.cast(a.self, dtype), low, *([high] if high is not None else [])]
    return g.op("Clip", *given)


def _remainder(op_type: str, g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    """With the sign of the divisor."""
    dtype = out[0].dtype
    value, by = g.cast(a.self, dtype), g.operand(a.other, dtype)
    if not dtype.is_floating_point:
        return g.op(op_type, value, by)
    return g.op("Sub", value, g.op("Mul", g.op("Floor", g.op("Div", value, by)), by))


def _rounded_division(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    dtype = out[0].dtype
    value, by = g.cast(a.self, dtype), g.operand(a.other, dtype)
    if getattr(a, "rounding_mode", "floor") != "floor" or dtype.is_floating_point:
        raise NotDirect(f"a division of {dtype} rounded otherwise than down to integers")
    return g.op("Div", g.op("Sub", value, g.op("Mod", value, by)), by)


def _where(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    dtype = out[0].dtype
    return g.op("Where", a.condition, g.cast(a.self, dtype), g.cast(a.other, dtype))


def _masked_fill(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    return g.op("Where", a.mask, g.operand(a.value, out[0].dtype), a.self)


def _reduced(op_type: str, g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    """Over `dim`, one axis or several; over all of them when it is not given."""
    axes = getattr(a, "dim", None)
    given = [axes] if isinstance(axes, int) else axes
    value, keep = g.cast(a.self, out[0].dtype), int(getattr(a, "keepdim", False))
    if not given:
        return g.op(op_type, value, keepdims=keep)
    return g.op(op_type, value, g.ints(given), keepdims=keep)


def _extreme(op_type: str, index: str, g: Builder, a: Any, out: Sequence[Spec]) -> Results:
    """Along one axis, and where; of equal ones the first, which PyTorch leaves open."""
    keep = int(a.keepdim)
    values = g.op(op_type, a.self, g.ints([a.dim]), keepdims=keep)
    return [values, g.op(index, a.self, axis=a.dim, keepdims=keep)]


def _subtracted(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    dtype = out[0].dtype
    if a.alpha != 1:
        raise NotDirect("rsub with a factor")
    return g.op("Sub", g.operand(a.other, dtype), g.cast(a.self, dtype))


def _softmax(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    return g.op("Softmax", g.cast(a.self, out[0].dtype), axis=a.dim)


def _cumulated(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    return g.op("CumSum", g.cast(a.self, out[0].dtype), g.scalar(a.dim, torch.int64))


def _layer_norm(g: Builder, a: Any, out: Sequence[Spec]) -> Results:
    if a.weight is None:
        raise NotDirect("a layer norm without a weight")
    operands = [a.input, a.weight, *([a.bias] if a.bias is not None else [])]
    attributes = {"axis": -len(a.normalized_shape), "epsilon": a.eps}
    return [g.ops("LayerNormalization", operands, attributes, 1)[0]]


def _linear(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    if len(dims(a.weight)) != 2:
        raise NotDirect("a linear layer whose weight is a vector")
    product = g.op("MatMul", a.input, g.op("Transpose", a.weight, perm=[1, 0]))
    return product if a.bias is None else g.op("Add", product, a.bias)


def _matmul(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    return g.op("MatMul", a.input, a.other)


def _mm(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    return g.op("MatMul", a.self, a.mat2)


def _addmm(g: Builder, a: Any, out: Sequence[Spec]) -> ir.Value:
    if (a.alpha, a.beta) != (1, 1):
        raise NotDirect("addmm with factors")
    return g.op("Add", g.op("MatMul", a.mat1, a.mat2), a.self)


def _both(names: Mapping[str, str], form: Any) -> dict[str, Operator]:
    """Each name with a tensor as its other operand, and with a number."""
    return {
        f"aten.{name}.{kind}": partial(form, op_type)
        for name, op_type in names.items()
        for kind in ("Tensor", "Scalar")
    }


_UNARY = {
    "abs": "Abs", "ceil": "Ceil", "cos": "Cos", "exp": "Exp", "floor": "Floor", "log": "Log",
    "neg": "Neg", "reciprocal": "Reciprocal", "relu": "Relu", "round": "Round",
    "sigmoid": "Sigmoid", "sin": "Sin", "sqrt": "Sqrt", "tanh": "Tanh", "erf": "Erf",
}  # fmt: skip
_BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div"}
_COMPARED = {
    "eq": "Equal", "ge": "GreaterOrEqual", "gt": "Greater", "le": "LessOrEqual", "lt": "Less",
}  # fmt: skip
_REDUCED = {
    "mean.dim": "ReduceMean", "mean.default": "ReduceMean", "sum.dim_IntList": "ReduceSum",
    "sum.default": "ReduceSum", "amax.default": "ReduceMax", "amin.default": "ReduceMin",
    "max.default": "ReduceMax", "min.default": "ReduceMin",
}  # fmt: skip

ARITHMETIC: Mapping[str, Operator] = {
    **{f"aten.{name}.default": partial(_unary, op) for name, op in _UNARY.items()},
    **_both(_BINARY, _binary),
    **_both(_COMPARED, _compared),
    **_both({"ne": "Equal"}, _unequal),
    **_both({"remainder": "Mod"}, _remainder),
    **_both({"bitwise_and": "And", "bitwise_or": "Or"}, _logical),
    **{f"aten.{name}": partial(_reduced, op) for name, op in _REDUCED.items()},
    "aten.logical_and.default": partial(_logical, "And"),
    "aten.logical_or.default": partial(_logical, "Or"),
    "aten.logical_not.default": _negated,
    "aten.bitwise_not.default": _negated,
    "aten.minimum.default": partial(_binary, "Min"),
    "aten.maximum.default": partial(_binary, "Max"),
    "aten.pow.Tensor_Scalar": _power,
    "aten.pow.Tensor_Tensor": _power,
    "aten.pow.Scalar": _power,
    "aten.rsqrt.default": _rsqrt,
    "aten.silu.default": _silu,
    "aten.gelu.default": _gelu,
    "aten.softplus.default": _softplus,
    "aten.clamp.default": _clamp,
    "aten.clamp_min.default": _clamp,
    "aten.clamp_max.default": _clamp,
    "aten.div.Tensor_mode": _rounded_division,
    "aten.floor_divide.default": _rounded_division,
    "aten.where.self": _where,
    "aten.masked_fill.Scalar": _masked_fill,
    "aten.masked_fill.Tensor": _masked_fill,
    "aten.rsub.Scalar": _subtracted,
    "aten.max.dim": partial(_extreme, "ReduceMax", "ArgMax"),
    "aten.min.dim": partial(_extreme, "ReduceMin", "ArgMin"),
    "aten._softmax.default": _softmax,
    "aten.cumsum.default": _cumulated,
    "aten.native_layer_norm.default": _layer_norm,
    "aten.mm.default": _mm,
    "aten.bmm.default": _mm,
    "aten.addmm.default": _addmm,
    "linear": _linear,
    "matmul": _matmul,
}  # fmt: skip
