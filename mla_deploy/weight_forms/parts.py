"""The tensors that a quantised weight is stored as, for each reader: their shapes and their bytes.

    layout    weight        values                              scales       zero points
    nbits     [R, K]        uint8 [R, blocks, block*bits/8]     [R, blocks]  uint8 [R, packed]
    rows      [R, K]        the same bytes, as [R, K*bits/8]
    heads     [H, I, O]     those of [H*O, I]: one product a head, the summed axis last
    qdq       [..., R, K]   int8, int4 or float8 [..., R, K]    [..., R, blocks], or [R]
    qdq_heads [H, I, O]     the same with blocks along I:       [H, blocks, O]

nbits, rows and heads are for ONNX Runtime (MatMulNBits, GatherBlockQuantized): numbers without a
sign, symmetric ones around 2^(bits-1), the low half of a byte first. qdq is for DequantizeLinear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from mla_deploy.weight_forms.form import PER_CHANNEL, WeightForm
from mla_deploy.weight_forms.rounding import Quantized, quantized

PARTS = ("values", "scales", "zero_points")
NBITS, ROWS, HEADS, QDQ, QDQ_HEADS = "nbits", "rows", "heads", "qdq", "qdq_heads"
LAYOUTS = (NBITS, ROWS, HEADS, QDQ, QDQ_HEADS)
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """One of the tensors of a weight of that form. `scale_dtype` is fp32, or a graph's half."""

    name: str  # one of PARTS
    form: WeightForm
    layout: str
    scale_dtype: str = "fp32"

    @property
    def dtype(self) -> str:
        """As the weight file calls it; int4 there is two to a byte."""
        if self.name == "scales":
            return self.scale_dtype
        is_packed = self.layout not in (QDQ, QDQ_HEADS) or self.name == "zero_points"
        return "uint8" if is_packed else self.form.kind

    def shape(self, weight: Shape) -> Shape:
        """In the graph, for a weight of that shape."""
        form = self.form
        if self.layout == QDQ_HEADS:
            heads, inner, outer = weight
            return weight if self.name == "values" else (heads, form.blocks(inner), outer)
        if self.layout == QDQ:
            if self.name == "values":
                return weight
            row = weight[:-1]
            return row if form.block == PER_CHANNEL else (*row, form.blocks(weight[-1]))
        rows, columns = summed_last(self.layout, weight)
        blocks = form.blocks(columns)
        blob = form.block * form.bits // 8
        if self.name == "values":
            return (rows, blocks * blob) if self.layout == ROWS else (rows, blocks, blob)
        return (rows, blocks if self.name == "scales" else -(-blocks * form.bits // 8))

    @property
    def stored(self) -> Part:
        """Readers that share bytes share what is stored."""
        return replace(self, layout=NBITS) if self.layout == ROWS else self


def part_names(form: WeightForm) -> tuple[str, ...]:
    return PARTS[:2] if form.symmetric else PARTS


def summed_last(layout: str, weight: Shape) -> tuple[int, int]:
    """Rows and columns of the matrix that is quantised along its columns."""
    if layout == HEADS:
        heads, inner, outer = weight
        return heads * outer, inner
    rows, columns = weight
    return rows, columns


def part_bytes(block: torch.Tensor, part: Part) -> dict[str, torch.Tensor]:
    """Every part of `block`, rows of a weight or the whole of it, as it goes to the file."""
    if part.layout in (HEADS, QDQ_HEADS):
        block = block.transpose(1, 2)  # [H, O, I]
    return packed(quantized(block, part.form, part.scale_dtype), part)


def packed(found: Quantized, part: Part) -> dict[str, torch.Tensor]:
    """The parts of a weight that is quantised already."""
    form = part.form
    scales, values = found.scales, found.values
    if part.layout in (QDQ, QDQ_HEADS):
        if part.layout == QDQ_HEADS:
            values, scales = values.transpose(1, 2), scales.transpose(1, 2)
        values = values.contiguous()
        if form.kind == "int4":
            values = _nibbles(values.flatten().view(torch.uint8) & 15)
        return {"values": values, "scales": scales.contiguous()}
    columns = values.shape[-1]
    short = form.blocks(columns) * form.block - columns
    middle = 2 ** (form.bits - 1)
    if form.symmetric:
        values = (values.to(torch.int16) + middle).to(torch.uint8)
    # What fills a last block stands for zero; no product meets it.
    values = torch.nn.functional.pad(values, (0, short), value=middle)
    parts = {"values": _nibbles(values) if form.bits == 4 else values, "scales": scales}
    if found.zero_points is not None:
        zeros = found.zero_points
        if form.bits == 4:
            zeros = _nibbles(torch.nn.functional.pad(zeros, (0, zeros.shape[-1] % 2)))
        parts["zero_points"] = zeros
    flat = {name: value.flatten(0, -2) for name, value in parts.items()}
    if part.layout != ROWS:
        flat["values"] = flat["values"].unflatten(-1, (form.blocks(columns), -1))
    return flat


def unpacked(parts: Mapping[str, torch.Tensor], part: Part, weight: Shape) -> Quantized:
    """What `packed` made `parts` of; of a half (layouts heads and qdq_heads) as [H, O, I].

    `weight`: its shape in the graph. The blocks are those of `part.form`.
    """
    form, values = part.form, parts["values"]
    if part.layout in (QDQ, QDQ_HEADS):
        if form.kind == "int4":
            values = ((_halves(values.flatten()) ^ 8).to(torch.int16) - 8).to(torch.int8)
        values = values.view(weight)
        scales = parts["scales"].float()
        if part.layout == QDQ_HEADS:
            scales = scales.view(weight[0], -1, weight[2]).transpose(1, 2)
            return Quantized(values.transpose(1, 2), scales, None)
        return Quantized(values, scales.view(*weight[:-1], -1), None)
    rows, columns = summed_last(part.layout, weight)
    codes = parts["values"].reshape(rows, -1)
    codes = (_halves(codes) if form.bits == 4 else codes)[:, :columns]
    if form.symmetric:
        codes = (codes.to(torch.int16) - 2 ** (form.bits - 1)).to(torch.int8)
    zeros = parts.get("zero_points")
    if zeros is not None and form.bits == 4:
        zeros = _halves(zeros)[:, : form.blocks(columns)]
    scales = parts["scales"].float()
    if part.layout == HEADS:
        split = weight[0], -1
        codes, scales = codes.unflatten(0, split), scales.unflatten(0, split)
        zeros = None if zeros is None else zeros.unflatten(0, split)
    return Quantized(codes, scales, zeros)


def _nibbles(values: torch.Tensor) -> torch.Tensor:
    """Two four-bit numbers a byte along the last axis, the first in the low half."""
    return values[..., 0::2] | (values[..., 1::2] << 4)


def _halves(packed: torch.Tensor) -> torch.Tensor:
    """The four-bit numbers of each byte along the last axis."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
