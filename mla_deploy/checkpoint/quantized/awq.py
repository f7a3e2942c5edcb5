"""AWQ packed for AutoAWQ's `gemm` kernel: weight = (value - zero point) * scale.

The matrix lies transposed: `X.qweight` int32 [columns, rows / 8] and `X.qzeros` int32
[groups, rows / 8] hold eight output rows in a word, interleaved; `X.scales` is [groups, rows].
"Rows" and "columns" are those of the weight, [output, input].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mla_deploy.checkpoint.header import TensorInfo
from mla_deploy.checkpoint.quantized.groups import blocks, dequantized, unpacked
from mla_deploy.checkpoint.quantized.parts import (
    FLOATS,
    Format,
    PartReader,
    QuantizedTensor,
    Stored,
    check_part_shape,
    logical,
    wrong_part,
)
from mla_deploy.quantization import WeightScheme

if TYPE_CHECKING:
    import torch

_QWEIGHT = ".qweight"
_PER_WORD = 8
# Where in a word, counted from the lowest four bits, each of eight neighbouring rows stands.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


def find(values: TensorInfo, stored: Stored, scheme: WeightScheme) -> QuantizedTensor:
    """Raises: InputError CKPT-PART, CKPT-PART-SHAPE."""
    stem = values.name.removesuffix(_QWEIGHT)
    if values.dtype != "I32" or len(values.shape) != 2:
        raise wrong_part(values, f"is {values.dtype} {list(values.shape)}, wanted a matrix of I32")
    columns, words = values.shape
    groups = blocks(columns, scheme.block[1])
    why = f"{columns} columns in groups of {scheme.block[1] or 'all'}"
    scale = stored.part(values, f"{stem}.scales", *FLOATS)
    check_part_shape(scale, ((groups, words * _PER_WORD),), why)
    parts = {"values": values, "scale": scale}
    if not scheme.symmetric or stored.has(f"{stem}.qzeros"):
        zero = stored.part(values, f"{stem}.qzeros", "I32")
        check_part_shape(zero, ((groups, words),), why)
        parts["zero_point"] = zero
    shape = (words * _PER_WORD, columns)
    others = [part for role, part in parts.items() if role != "values"]
    return QuantizedTensor(logical(values, f"{stem}.weight", shape, *others), scheme, parts)


def read(
    tensor: QuantizedTensor, reader: PartReader, index: int | None, start: int, stop: int
) -> torch.Tensor:
    """Output rows start to stop as float32 [rows, columns]."""
    parts, columns = tensor.parts, tensor.info.shape[1]
    values_RC = _rows(parts["values"], reader, start, stop).float()
    scale_RG = reader.transposed_grid(parts["scale"], start, stop)
    if "zero_point" in parts:
        zero_RG = _rows(parts["zero_point"], reader, start, stop).float()
    else:
        values_RC.sub_(1 << (tensor.scheme.bits - 1))
        zero_RG = None
    width = tensor.scheme.block[1] or columns
    return dequantized(values_RC, scale_RG, zero_RG, None, width=width)


def _rows(part: TensorInfo, reader: PartReader, start: int, stop: int) -> torch.Tensor:
    """Rows start to stop of a tensor that lies transposed and packed along its rows."""
    first = start // _PER_WORD
    codes = unpacked(reader.columns(part, first, blocks(stop, _PER_WORD)), 4)
    codes = codes.unflatten(1, (-1, _PER_WORD))[..., list(_PLACES)].flatten(1)
    return codes[:, start - first * _PER_WORD : stop - first * _PER_WORD].T.contiguous()


FORMAT = Format(claims=lambda info: info.name.endswith(_QWEIGHT), find=find, read=read)
