"""Builds an ONNX graph node by node: constants, sizes and equal nodes are there once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from mla_deploy import shapes
from mla_deploy.export.direct.record import NotDirect, Spec
from mla_deploy.export.direct.sizes import Size

DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float64: ir.DataType.DOUBLE,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.int16: ir.DataType.INT16,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
    torch.bool: ir.DataType.BOOL,
}
_TORCH_DTYPES = {onnx: dtype for dtype, onnx in DTYPES.items()}
Number = bool | int | float | Size


class Builder:
    """The nodes so far. `sources` says of which input's axis each size is the length."""

    def __init__(self, sources: Mapping[str, tuple[ir.Value, int]]) -> None:
        self.nodes: list[ir.Node] = []
        self._sources = sources
        self._made: dict[Any, Any] = {}

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """A node with one output; an equal one is there once."""
        return self.ops(op_type, inputs, attributes, 1)[0]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any],
        outputs: int,
        domain: str = "",
    ) -> Sequence[ir.Value]:
        """The outputs of a node."""
        key = (domain, op_type, outputs, *map(id, inputs), str(sorted(attributes.items())))
        if key not in self._made:
            node = ir.node(
                op_type,
                inputs,
                attributes=dict(attributes) or None,
                num_outputs=outputs,
                domain=domain,
            )
            for place, value in enumerate(node.outputs):
                value.name = f"{op_type}_{len(self.nodes)}" + (f"_{place}" if place else "")
            self.nodes.append(node)
            self._made[key] = node.outputs
        made: Sequence[ir.Value] = self._made[key]
        return made

    def constant(self, array: np.ndarray) -> ir.Value:
        """A Constant node of the array."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._made:
            value = self.op("Constant", value=ir.tensor(array, name=f"constant_{len(self._made)}"))
            value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
            value.const_value = value.producer().attributes["value"].value  # type: ignore[union-attr]
            self._made[key] = value
        made: ir.Value = self._made[key]
        return made

    def ints(self, numbers: Sequence[int | Size | None]) -> ir.Value:
        """A vector of integers, of which some may be sizes."""
        pieces: list[Any] = []
        for number in numbers:
            if isinstance(number, Size):
                pieces.append(self._size(number))
            elif number is None:
                raise NotDirect("a shape has a length of no known form")
            elif pieces and isinstance(pieces[-1], list):
                pieces[-1].append(number)
            else:
                pieces.append([number])
        values = [
            self.constant(np.array(piece, np.int64)) if isinstance(piece, list) else piece
            for piece in pieces or [[]]
        ]
        return values[0] if len(values) == 1 else self.op("Concat", *values, axis=0)

    def scalar(self, number: Number, dtype: torch.dtype) -> ir.Value:
        """A number as a tensor without axes."""
        if isinstance(number, Size):
            length = self.op("Squeeze", self._size(number))
            length.shape, length.dtype = ir.Shape(()), ir.DataType.INT64
            return self.cast(length, dtype)
        return self.constant(np.array(number, DTYPES[dtype].numpy()))

    def operand(self, given: ir.Value | Number, dtype: torch.dtype) -> ir.Value:
        """A tensor in `dtype`, or a number as one."""
        if isinstance(given, ir.Value):
            return self.cast(given, dtype)
        return self.scalar(given, dtype)

    def cast(self, value: ir.Value, dtype: torch.dtype) -> ir.Value:
        """`value` in `dtype`; no node when it is there already."""
        if value.dtype == DTYPES[dtype]:
            return value
        made = self.op("Cast", value, to=DTYPES[dtype])
        made.shape, made.dtype = value.shape, DTYPES[dtype]
        return made

    def reshape(self, value: ir.Value, shape: Sequence[int | Size | None]) -> ir.Value:
        """`value` in `shape`; what keeps its axis, and one further size, need no arithmetic."""
        before = dims(value)
        if list(before) == list(shape) and None not in before:
            return value
        if 0 in shape or any(shapes.PAST_TOKENS in size.names for size in _sizes(before)):
            # Of nothing, which a growing cache begins with, no length can be left open.
            return self.op("Reshape", value, self.ints(shape), allowzero=1)
        wanted: list[int | Size | None] = []
        for axis, size in enumerate(shape):
            kept = axis < len(before) and before[axis] == size and isinstance(size, Size)
            wanted.append(0 if kept else size)
        free = [axis for axis, size in enumerate(wanted) if not isinstance(size, int)]
        if len(free) == 1:
            wanted[free[0]] = -1
        return self.op("Reshape", value, self.ints(wanted))

    def _size(self, size: Size) -> ir.Value:
        """A size as a vector of one."""
        lengths = []
        for name in size.names:
            source, axis = self._sources[name]
            lengths.append(self.op("Shape", source, start=axis, end=axis + 1))
        total = lengths[0]
        for length in lengths[1:]:
            total = self.op({"*": "Mul", "+": "Add", "-": "Sub"}[size.form], total, length)
        if size.factor != 1:
            total = self.op("Mul", total, self.ints([size.factor]))
        return self.op("Add", total, self.ints([size.offset])) if size.offset else total


def described(value: ir.Value, spec: Spec) -> None:
    """Give `value` the shape and dtype of `spec`."""
    value.shape = ir.Shape([s if isinstance(s, int) else s and str(s) for s in spec.shape])
    value.dtype = DTYPES[spec.dtype]
    value.meta["dims"] = spec.shape


def _sizes(numbers: Sequence[int | Size | None]) -> list[Size]:
    return [number for number in numbers if isinstance(number, Size)]


def dims(value: ir.Value) -> tuple[int | Size | None, ...]:
    """The sizes of the axes of a value that was described."""
    found: tuple[int | Size | None, ...] = value.meta["dims"]
    return found


def torch_dtype(value: ir.Value) -> torch.dtype:
    """The dtype of a value that was described, as torch calls it."""
    if value.dtype is None:
        raise NotDirect("the dtype of an operand is not known")
    return _TORCH_DTYPES[value.dtype]
