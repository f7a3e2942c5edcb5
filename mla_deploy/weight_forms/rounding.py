"""Round to nearest: float weights to whole numbers, or to float8, and a scale for each block.

    symmetric    q = clamp(round(w / s), -2^(b-1), 2^(b-1) - 1)          w' = q s        s > 0
    asymmetric   q = clamp(round(w / s) + z, 0, 2^b - 1)                 w' = (q - z) s
    fp8          q = float8_e4m3(w / s)                                  w' = q s

All along the last axis. The symmetric scale of four bits is chosen among a few by the squared
error of the block: the widest value may be cut a little where that lets all others be finer. It
stays positive, since TensorRT takes no other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from mla_deploy.weight_forms.form import WeightForm

FP8_MAX = 448.0
# The largest magnitude of a block falls on one of these values; 7 cuts nothing.
_CANDIDATES_4 = (7.0, 7.5, 8.0, 8.75)
# Of each end of a block with a zero point: what a search may keep of it.
_KEPT = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
_FOUR = 4
SCALE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Quantized:
    """A weight [..., K]: `values` as wide, int8 or float8, of signed numbers when symmetric and of
    0 to 2^bits - 1, as uint8, when not; `scales` fp32 [..., blocks]; `zero_points` uint8 like them,
    None when symmetric."""

    values: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None


def quantized(weight: torch.Tensor, form: WeightForm, scale_dtype: str = "fp32") -> Quantized:
    """`weight` [..., K], of any float dtype, rounded to `form`.

    Scales are fp32 numbers that `scale_dtype` (fp32, fp16, bf16) holds exactly.
    """
    blocked = blocked_weight(weight.float(), form)
    grid = fitted_grid(blocked, form, scale_dtype)
    return grid.stored(grid.codes(blocked).flatten(-2)[..., : weight.shape[-1]])


@dataclass(frozen=True)
class Grid:
    """What the blocks of a weight may be rounded to: `scales` [..., blocks] fp32, and zero points
    like them, as floats; None when symmetric."""

    form: WeightForm
    scales: torch.Tensor
    zero_points: torch.Tensor | None

    def codes(self, blocked: torch.Tensor) -> torch.Tensor:
        """[..., blocks, width] -> the numbers that are stored, as fp32; of fp8 as float8."""
        scaled = blocked / self.scales[..., None]
        if self.form.is_float:
            return scaled.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        if self.zero_points is None:
            half = 2 ** (self.form.bits - 1)
            return scaled.round_().clamp_(-half, half - 1)
        scaled.round_().add_(self.zero_points[..., None])
        return scaled.clamp_(0, 2**self.form.bits - 1)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """What a graph computes with for `codes` [..., blocks, width], fp32."""
        wide = codes.float()
        if self.zero_points is not None:
            wide = wide - self.zero_points[..., None]
        return wide * self.scales[..., None]

    def stored(self, codes: torch.Tensor) -> Quantized:
        """With codes [..., K] of a whole weight."""
        zeros = self.zero_points
        if zeros is not None:
            return Quantized(codes.to(torch.uint8), self.scales, zeros.to(torch.uint8))
        kept = codes.dtype if self.form.is_float else torch.int8
        return Quantized(codes.to(kept), self.scales, None)


def fitted_grid(blocked: torch.Tensor, form: WeightForm, scale_dtype: str = "fp32") -> Grid:
    """The grid for `blocked` [..., blocks, width], fp32."""
    held = SCALE_DTYPES[scale_dtype]
    if form.is_float:
        return Grid(form, _held(_positive(blocked.abs().amax(-1) / FP8_MAX), held), None)
    if form.symmetric:
        return Grid(form, _held(_symmetric_scales(blocked, form.bits), held), None)
    low, high = _ends(blocked)
    return _between(low, high, form, held)


def searched_grid(
    blocked: torch.Tensor, form: WeightForm, importance_W: torch.Tensor, scale_dtype: str = "fp32"
) -> Grid:
    """`fitted_grid`, but of four bits the one among some that cut the ends whose squared error is
    least, that of each value times its `importance_W` [width]."""
    if form.bits != _FOUR:
        return fitted_grid(blocked, form, scale_dtype)
    first, *others = _cut_grids(blocked, form, SCALE_DTYPES[scale_dtype])
    scales, zeros, least = first.scales, first.zero_points, _weighed(blocked, first, importance_W)
    for grid in others:
        error = _weighed(blocked, grid, importance_W)
        better = error < least
        least = torch.where(better, error, least)
        scales = torch.where(better, grid.scales, scales)
        if zeros is not None and grid.zero_points is not None:
            zeros = torch.where(better, grid.zero_points, zeros)
    return Grid(form, scales, zeros)


def dequantized(quantized: Quantized, form: WeightForm) -> torch.Tensor:
    """The weight that a graph computes with, fp32."""
    values = quantized.values.float()
    columns = values.shape[-1]
    width = form.width(columns)
    spread = quantized.scales.repeat_interleave(width, -1)[..., :columns]
    if quantized.zero_points is not None:
        values = values - quantized.zero_points.float().repeat_interleave(width, -1)[..., :columns]
    return values * spread


def blocked_weight(weight: torch.Tensor, form: WeightForm) -> torch.Tensor:
    """[..., K] -> [..., blocks, width]; a short last block is filled with zeros."""
    columns = weight.shape[-1]
    width, blocks = form.width(columns), form.blocks(columns)
    if blocks * width != columns:
        weight = torch.nn.functional.pad(weight, (0, blocks * width - columns))
    return weight.reshape(*weight.shape[:-1], blocks, width)


def _ends(blocked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Zero is a value of its own: an exact zero stays one."""
    return blocked.amin(-1).clamp(max=0.0), blocked.amax(-1).clamp(min=0.0)


def _between(low: torch.Tensor, high: torch.Tensor, form: WeightForm, held: torch.dtype) -> Grid:
    most = 2**form.bits - 1
    scales = _held(_positive((high - low) / most), held)
    return Grid(form, scales, (-low / scales).round().clamp(0, most))


def _cut_grids(blocked: torch.Tensor, form: WeightForm, held: torch.dtype) -> Iterator[Grid]:
    """The first cuts nothing."""
    if form.symmetric:
        largest = blocked.abs().amax(-1)
        for divisor in _CANDIDATES_4:
            yield Grid(form, _held(_positive(largest / divisor), held), None)
        return
    low, high = _ends(blocked)
    for of_low, of_high in product(_KEPT, _KEPT):
        yield _between(low * of_low, high * of_high, form, held)


def _weighed(blocked: torch.Tensor, grid: Grid, importance_W: torch.Tensor) -> torch.Tensor:
    error = grid.values(grid.codes(blocked)).sub_(blocked).square_()
    return error.mul_(importance_W).sum(-1)


def _symmetric_scales(blocked: torch.Tensor, bits: int) -> torch.Tensor:
    largest = blocked.abs().amax(-1)
    if bits == 8:
        return _positive(largest / 127.0)
    best = _positive(largest / _CANDIDATES_4[0])
    least = _error(blocked, best, bits)
    for divisor in _CANDIDATES_4[1:]:
        scales = _positive(largest / divisor)
        error = _error(blocked, scales, bits)
        better = error < least
        best = torch.where(better, scales, best)
        least = torch.where(better, error, least)
    return best


def _error(blocked: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    half = 2 ** (bits - 1)
    found = (blocked / scales[..., None]).round_().clamp_(-half, half - 1)
    return found.mul_(scales[..., None]).sub_(blocked).square_().sum(-1)


def _held(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded to `dtype`, and never to zero, nor to one of its coarse smallest numbers."""
    if dtype == torch.float32:
        return scales
    return scales.clamp(min=torch.finfo(dtype).tiny).to(dtype).float()


def _positive(scales: torch.Tensor) -> torch.Tensor:
    """A block of zeros, or of denormals, keeps a scale that can be divided by."""
    return torch.where(scales < _TINY, torch.ones_like(scales), scales)
