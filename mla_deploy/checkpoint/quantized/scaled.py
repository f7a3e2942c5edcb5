"""Values of 8 bits in the weight's own shape, and a grid of scales: weight = value * scale.

`fp8` is DeepSeek's and transformers' naming: float8_e4m3fn `X` and `X_scale_inv` (which multiplies,
whatever its name says), one scale for each block of rows and columns, the last blocks perhaps in
part. `scaled` is that of compressed-tensors and ModelOpt: float8_e4m3fn or int8 `X.weight`,
`X.weight_scale`, perhaps `X.weight_zero_point`, with one scale per tensor, row, group or block.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from mla_deploy.checkpoint.header import TensorInfo
from mla_deploy.checkpoint.quantized.groups import blocks, decoded, dequantized
from mla_deploy.checkpoint.quantized.parts import (
    FLOATS,
    Format,
    PartReader,
    QuantizedTensor,
    Stored,
    check_part_shape,
    logical,
)
from mla_deploy.quantization import WeightScheme

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

_WEIGHT = ".weight"
# Other endings of the same scale: Mistral's own, and that of FP8 with one scale per tensor.
_OTHER_SCALES = (".qscale_weight", ".weight_scale")


def find_fp8(values: TensorInfo, stored: Stored, scheme: WeightScheme) -> QuantizedTensor:
    """Raises: InputError CKPT-PART, CKPT-PART-SHAPE."""
    name = f"{values.name}_scale_inv"
    if values.name.endswith(_WEIGHT) and not stored.has(name):
        others = [values.name.removesuffix(_WEIGHT) + ending for ending in _OTHER_SCALES]
        name = next((other for other in others if stored.has(other)), name)
    return _found(values, stored.part(values, name, *FLOATS, "F8_E8M0", "U8"), None, scheme)


def find_scaled(values: TensorInfo, stored: Stored, scheme: WeightScheme) -> QuantizedTensor:
    """Raises: InputError CKPT-PART, CKPT-PART-SHAPE."""
    scale = stored.part(values, f"{values.name}_scale", *FLOATS)
    zero_name, zero = f"{values.name}_zero_point", None
    if not scheme.symmetric or stored.has(zero_name):
        zero = stored.part(values, zero_name, "I8", *FLOATS)
    return _found(values, scale, zero, scheme)


def read_scaled(
    tensor: QuantizedTensor, reader: PartReader, index: int | None, start: int, stop: int
) -> torch.Tensor:
    """Output rows start to stop as float32 [rows, columns]."""
    import torch

    values, scale = tensor.parts["values"], tensor.parts["scale"]
    size, half = _grid(values, scale, tensor.scheme)
    height = tensor.scheme.block[0] or half
    # The row of the grid for each row of the weight; a second half starts a block of its own.
    row_R = torch.arange(start, stop)
    block_R = row_R // half * blocks(half, height) + row_R % half // height
    first, last = int(block_R[0]), int(block_R[-1]) + 1

    def per_row(part: TensorInfo) -> torch.Tensor:
        return reader.grid(part, index, first, last, size=size).index_select(0, block_R - first)

    zero = tensor.parts.get("zero_point")
    values_RC = decoded(reader.rows(values, index, start, stop), _table(values.dtype))
    return dequantized(
        values_RC,
        per_row(scale),
        None if zero is None else per_row(zero),
        None,
        width=tensor.scheme.block[1] or values.shape[-1],
    )


@lru_cache
def _table(dtype: str) -> NDArray[np.float32]:
    """What each byte means: as float8_e4m3fn, or as a signed integer."""
    import torch

    of_bytes = torch.arange(256, dtype=torch.uint8)
    values = of_bytes.view(torch.int8 if dtype == "I8" else torch.float8_e4m3fn).float()
    table: NDArray[np.float32] = values.reshape(256, 1).numpy()
    return table


def _found(
    values: TensorInfo, scale: TensorInfo, zero: TensorInfo | None, scheme: WeightScheme
) -> QuantizedTensor:
    size, _ = _grid(values, scale, scheme)
    why = f"{list(values.shape)} in blocks of {_told(scheme.block)}"
    parts = {"values": values, "scale": scale}
    if zero is not None:
        parts["zero_point"] = zero
    for part in list(parts.values())[1:]:
        check_part_shape(part, _shapes(values.shape[:-2], size), why)
    info = logical(values, values.name, values.shape, *list(parts.values())[1:])
    return QuantizedTensor(info, scheme, parts)


def _grid(
    values: TensorInfo, scale: TensorInfo, scheme: WeightScheme
) -> tuple[tuple[int, int], int]:
    """(rows and columns of the grid of scales, rows of the weight that are tiled as one).

    transformers joins an expert's gate and up: where a half ends inside a block, each half has its
    own last block, so the grid has a row more than the joined matrix alone would need.
    """
    height, width = values.shape[-2:]
    down, across = blocks(height, scheme.block[0]), blocks(width, scheme.block[1])
    joined = values.name.endswith((".gate_up_proj", ".gate_up_proj.weight")) and height % 2 == 0
    in_halves = 2 * blocks(height // 2, scheme.block[0])
    if joined and in_halves != down and scale.shape[-2:-1] == (in_halves,):
        return (in_halves, across), height // 2
    return (down, across), height


def _shapes(leading: tuple[int, ...], size: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    """The shapes in which a grid is stored: axes of one value may be left out."""
    shapes = [(*leading, *size)]
    if size[1] == 1:
        shapes.append((*leading, size[0]))
    if size == (1, 1):
        shapes.append(leading)
    return tuple(shapes)


def _told(block: tuple[int, int]) -> str:
    return " x ".join(str(side) if side else "all" for side in block)


FP8 = Format(
    claims=lambda info: info.dtype == "F8_E4M3" and len(info.shape) in (2, 3),
    find=find_fp8,
    read=read_scaled,
)
SCALED = Format(
    claims=lambda info: (
        info.dtype in ("F8_E4M3", "I8") and len(info.shape) == 2 and info.name.endswith(_WEIGHT)
    ),
    find=find_scaled,
    read=read_scaled,
)
