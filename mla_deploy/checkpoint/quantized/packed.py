"""compressed-tensors `pack-quantized`: weight = (value - zero point) * scale.

`X.weight_packed` int32 [rows, columns x bits / 32] holds unsigned values along the columns, lowest
bits first, shifted up by half their range; `X.weight_shape` tells the shape before packing;
`X.weight_scale` has one scale per tensor, row or group of columns; `X.weight_zero_point`, if the
scheme is not symmetric, is packed the same way but along the rows. `X.weight_g_idx` (old releases)
names the group of each column.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mla_deploy.checkpoint.header import TensorInfo
from mla_deploy.checkpoint.quantized.groups import (
    blocks,
    decoded,
    dequantized,
    integer_table,
    unpacked,
)
from mla_deploy.checkpoint.quantized.index import find_group_index, read_group_index
from mla_deploy.checkpoint.quantized.parts import (
    FLOATS,
    Format,
    PartReader,
    QuantizedTensor,
    Stored,
    check_part_shape,
    logical,
    wrong_part,
    wrong_value,
)
from mla_deploy.errors import quoted
from mla_deploy.quantization import WeightScheme

if TYPE_CHECKING:
    import torch

_PACKED = "_packed"


def find(values: TensorInfo, stored: Stored, scheme: WeightScheme) -> QuantizedTensor:
    """Raises: InputError CKPT-PART, CKPT-PART-SHAPE, CKPT-PART-VALUE."""
    name = values.name.removesuffix(_PACKED)
    if values.dtype != "I32" or len(values.shape) not in (2, 3):
        raise wrong_part(values, f"is {values.dtype} {list(values.shape)}, wanted a matrix of I32")
    shape_part = stored.part(values, f"{name}_shape", "I64", "I32")
    shape = stored.integers(shape_part, 3)
    _check_told_shape(values, shape_part, shape, scheme.bits)
    leading, (rows, columns) = shape[:-2], shape[-2:]
    groups = blocks(columns, scheme.block[1])
    scale = stored.part(values, f"{name}_scale", *FLOATS)
    why = f"{list(shape)} in groups of {scheme.block[1] or 'all'} columns"
    if scheme.block[0]:
        check_part_shape(scale, ((*leading, rows, groups),), why)
    else:
        check_part_shape(scale, ((*leading, 1), leading, (*leading, 1, 1)), why)
    parts = {"values": values, "scale": scale, "shape": shape_part}
    if not scheme.symmetric:
        zero = stored.part(values, f"{name}_zero_point", "I32")
        words = blocks(rows, 32 // scheme.bits)
        check_part_shape(zero, ((*leading, words, groups),), f"{why}, packed along the rows")
        parts["zero_point"] = zero
    elif stored.has(f"{name}_zero_point"):
        zero = stored.part(values, f"{name}_zero_point", "I32", "I8")
        raise wrong_part(zero, "is there, but config.json says that the weights are symmetric")
    if scheme.reordered:
        parts["group_index"] = find_group_index(values, stored, f"{name}_g_idx", columns)
    others = [part for role, part in parts.items() if role != "values"]
    return QuantizedTensor(logical(values, name, shape, *others), scheme, parts)


def read(
    tensor: QuantizedTensor, reader: PartReader, index: int | None, start: int, stop: int
) -> torch.Tensor:
    """Output rows start to stop as float32 [rows, columns]."""
    scheme, parts = tensor.scheme, tensor.parts
    rows, columns = tensor.info.shape[-2:]
    groups = blocks(columns, scheme.block[1])
    words_RW = reader.rows(parts["values"], index, start, stop)
    # A zero point is stored with the same shift as the values: it falls out of the difference.
    shift = 1 << (scheme.bits - 1) if scheme.symmetric else 0
    values_RC = decoded(words_RW, integer_table(scheme.bits, shift))[:, :columns]
    if scheme.block[0]:
        scale_RG = reader.grid(parts["scale"], index, start, stop, size=(rows, groups))
    else:
        scale_RG = reader.grid(parts["scale"], index, 0, 1, size=(1, 1)).expand(stop - start, 1)
    zero_RG = None
    if not scheme.symmetric:
        zero_RG = _zero_points(tensor, reader, index, start, stop).float()
    group_index = read_group_index(parts.get("group_index"), reader, groups)
    width = scheme.block[1] or columns
    return dequantized(values_RC, scale_RG, zero_RG, group_index, width=width).contiguous()


def _zero_points(
    tensor: QuantizedTensor, reader: PartReader, index: int | None, start: int, stop: int
) -> torch.Tensor:
    per_word = 32 // tensor.scheme.bits
    first = start // per_word
    words_WG = reader.rows(tensor.parts["zero_point"], index, first, blocks(stop, per_word))
    zero_GR = unpacked(words_WG.T, tensor.scheme.bits)
    return zero_GR[:, start - first * per_word : stop - first * per_word].T


def _check_told_shape(
    values: TensorInfo, part: TensorInfo, shape: tuple[int, ...], bits: int
) -> None:
    """`weight_shape` is data, so it may say anything; the packed tensor's header does not lie."""
    fits = (
        len(shape) == len(values.shape)
        and shape[:-1] == values.shape[:-1]
        and shape[-1] > 0
        and blocks(shape[-1] * bits, 32) == values.shape[-1]
    )
    if not fits:
        raise wrong_value(
            part,
            f"says {quoted(list(shape))}, but {quoted(values.name)} is {list(values.shape)} words "
            f"of {32 // bits} values",
        )


FORMAT = Format(claims=lambda info: info.name.endswith(f".weight{_PACKED}"), find=find, read=read)
