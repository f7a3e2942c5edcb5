"""NVFP4: float4_e2m1 values, two in a byte, a float8_e4m3fn scale per group of 16 columns, and one
float32 factor for the whole tensor.

compressed-tensors divides by it: `X.weight_packed`, `X.weight_scale`, `X.weight_global_scale`,
weight = value * (scale / global). ModelOpt multiplies: `X.weight` (uint8), `X.weight_scale`,
`X.weight_scale_2`, weight = value * (scale * scale_2). The first of two values is the low half.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from mla_deploy.checkpoint.header import TensorInfo
from mla_deploy.checkpoint.quantized.groups import blocks, decoded, dequantized
from mla_deploy.checkpoint.quantized.parts import (
    Format,
    PartReader,
    QuantizedTensor,
    Stored,
    check_part_shape,
    logical,
    wrong_part,
    wrong_value,
)
from mla_deploy.quantization import WeightScheme

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

_WEIGHT = ".weight"
# Sign, two bits of exponent, one of mantissa.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def find_compressed_tensors(
    values: TensorInfo, stored: Stored, scheme: WeightScheme
) -> QuantizedTensor:
    """Raises: InputError CKPT-PART, CKPT-PART-SHAPE."""
    name = values.name.removesuffix("_packed")
    return _found(values, name, "_global_scale", stored, scheme)


def find_modelopt(values: TensorInfo, stored: Stored, scheme: WeightScheme) -> QuantizedTensor:
    """Raises: InputError CKPT-PART, CKPT-PART-SHAPE."""
    return _found(values, values.name, "_scale_2", stored, scheme)


def read_divided(
    tensor: QuantizedTensor, reader: PartReader, index: int | None, start: int, stop: int
) -> torch.Tensor:
    """Output rows start to stop as float32 [rows, columns]; the factor divides."""
    scale_RG, factor = _scales(tensor, reader, start, stop)
    if not factor > 0:
        raise wrong_value(tensor.parts["global_scale"], f"is {factor}, wanted a number above 0")
    return _values(tensor, reader, start, stop, scale_RG / factor)


def read_multiplied(
    tensor: QuantizedTensor, reader: PartReader, index: int | None, start: int, stop: int
) -> torch.Tensor:
    """Output rows start to stop as float32 [rows, columns]; the factor multiplies."""
    scale_RG, factor = _scales(tensor, reader, start, stop)
    return _values(tensor, reader, start, stop, scale_RG * factor)


def _found(
    values: TensorInfo, name: str, factor_ending: str, stored: Stored, scheme: WeightScheme
) -> QuantizedTensor:
    if values.dtype != "U8" or len(values.shape) != 2:
        raise wrong_part(values, f"is {values.dtype} {list(values.shape)}, wanted a matrix of U8")
    shape = (values.shape[0], 2 * values.shape[1])
    scale = stored.part(values, f"{name}_scale", "F8_E4M3")
    factor = stored.part(values, f"{name}{factor_ending}", "F32")
    wanted = (shape[0], blocks(shape[1], scheme.block[1]))
    check_part_shape(scale, (wanted,), f"{list(shape)} in groups of {scheme.block[1]} columns")
    check_part_shape(factor, ((), (1,), (1, 1)), "the whole tensor")
    parts = {"values": values, "scale": scale, "global_scale": factor}
    return QuantizedTensor(logical(values, name, shape, scale, factor), scheme, parts)


def _scales(
    tensor: QuantizedTensor, reader: PartReader, start: int, stop: int
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = tensor.info.shape
    size = (rows, blocks(columns, tensor.scheme.block[1]))
    scale_RG = reader.grid(tensor.parts["scale"], None, start, stop, size=size)
    return scale_RG, reader.grid(tensor.parts["global_scale"], None, 0, 1, size=(1, 1))


def _values(
    tensor: QuantizedTensor, reader: PartReader, start: int, stop: int, scale_RG: torch.Tensor
) -> torch.Tensor:
    values_RC = decoded(reader.rows(tensor.parts["values"], None, start, stop), _table())
    return dequantized(values_RC, scale_RG, None, None, width=tensor.scheme.block[1])


@lru_cache
def _table() -> NDArray[np.float32]:
    """The two values of each byte."""
    import numpy as np

    values = [*_E2M1, *(-value for value in _E2M1)]
    return np.array([(values[byte & 15], values[byte >> 4]) for byte in range(256)], np.float32)


COMPRESSED_TENSORS = Format(
    claims=lambda info: info.name.endswith(".weight_packed"),
    find=find_compressed_tensors,
    read=read_divided,
)
MODELOPT = Format(
    claims=lambda info: info.dtype == "U8" and info.name.endswith(_WEIGHT),
    find=find_modelopt,
    read=read_multiplied,
)
