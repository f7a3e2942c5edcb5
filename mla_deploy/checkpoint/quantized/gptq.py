"""GPTQ as AutoGPTQ and GPTQModel pack it: weight = (value - zero point) * scale.

The matrix lies transposed: `X.qweight` int32 [columns x bits / 32, rows] holds neighbouring input
columns in a word, lowest bits first; `X.qzeros` int32 [groups, rows x bits / 32] is packed along
the rows; `X.scales` is [groups, rows]; `X.g_idx` names the group of each column. Zero points are
stored less one ("gptq"), modulo their range, or as they are ("gptq_v2"). "Rows" and "columns" are
those of the weight, [output, input].
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
)
from mla_deploy.quantization import WeightScheme

if TYPE_CHECKING:
    import torch

_QWEIGHT = ".qweight"


def find(values: TensorInfo, stored: Stored, scheme: WeightScheme) -> QuantizedTensor:
    """Raises: InputError CKPT-PART, CKPT-PART-SHAPE."""
    stem, per_word = values.name.removesuffix(_QWEIGHT), 32 // scheme.bits
    if values.dtype != "I32" or len(values.shape) != 2:
        raise wrong_part(values, f"is {values.dtype} {list(values.shape)}, wanted a matrix of I32")
    rows, columns = values.shape[1], values.shape[0] * per_word
    groups = blocks(columns, scheme.block[1])
    why = f"{[rows, columns]} in groups of {scheme.block[1] or 'all'} columns"
    scale = stored.part(values, f"{stem}.scales", *FLOATS)
    check_part_shape(scale, ((groups, rows),), why)
    zero = stored.part(values, f"{stem}.qzeros", "I32")
    check_part_shape(zero, ((groups, blocks(rows, per_word)),), why)
    parts = {"values": values, "scale": scale, "zero_point": zero}
    if scheme.reordered or stored.has(f"{stem}.g_idx"):
        parts["group_index"] = find_group_index(values, stored, f"{stem}.g_idx", columns)
    others = [part for role, part in parts.items() if role != "values"]
    info = logical(values, f"{stem}.weight", (rows, columns), *others)
    return QuantizedTensor(info, scheme, parts)


def read(
    tensor: QuantizedTensor, reader: PartReader, index: int | None, start: int, stop: int
) -> torch.Tensor:
    """Output rows start to stop as float32 [rows, columns]."""
    parts, bits, columns = tensor.parts, tensor.scheme.bits, tensor.info.shape[1]
    values_RC = decoded(reader.columns(parts["values"], start, stop).T, integer_table(bits, 0))
    scale_RG = reader.transposed_grid(parts["scale"], start, stop)
    per_word = 32 // bits
    first = start // per_word
    words_GW = reader.columns(parts["zero_point"], first, blocks(stop, per_word))
    zero_GR = unpacked(words_GW, bits)[:, start - first * per_word : stop - first * per_word]
    if tensor.scheme.layout == "gptq":
        zero_GR = (zero_GR + 1) & ((1 << bits) - 1)
    width = tensor.scheme.block[1] or columns
    group_index = read_group_index(parts.get("group_index"), reader, scale_RG.shape[1])
    return dequantized(values_RC, scale_RG, zero_GR.T.float(), group_index, width=width)


FORMAT = Format(claims=lambda info: info.name.endswith(_QWEIGHT), find=find, read=read)
