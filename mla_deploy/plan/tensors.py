"""The weights of an export before there is one: every tensor it would store, and its bytes.

Parameters are those of transformers' own class, built from the config without weights, as an export
takes them; names, roles and forms are the export's own. A few tensors that no graph reads are
counted all the same: measured, the sum is within 1 % of the file (`tests/plan/test_weights.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from torch._subclasses.fake_tensor import FakeTensorMode

from mla_deploy.config import MlaConfig
from mla_deploy.export.weights import StoredWeight, stored_dtype
from mla_deploy.rewrite.weights import HALVES, WeightUse
from mla_deploy.source.model import empty_model, model_weights
from mla_deploy.source.storage import stored_shape
from mla_deploy.targets import Target
from mla_deploy.weight_forms.fit import fitted
from mla_deploy.weight_forms.form import WeightForm, WeightPlan
from mla_deploy.weight_forms.parts import HEADS, NBITS, QDQ, QDQ_HEADS, Part, part_names
from mla_deploy.weight_forms.rounded import LEAST_COLUMNS, PlanRounding

PARTS = ("embedding", "head", "attention", "experts", "other")
_LAYER = re.compile(r"\.layers\.(\d+)\.")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Tensor:
    """A parameter: `copies` matrices of that shape (experts are stored one by one), one of PARTS.

    Experts that only pass their input on have no weights and are not counted.
    """

    name: str
    shape: Shape
    copies: int
    part: str
    layer: int | None

    @property
    def elements(self) -> int:
        return self.copies * prod(self.shape)


@dataclass(frozen=True)
class StoredBytes:
    """Bytes of a weight file: all of them by part, and what of them is not plain float."""

    by_part: Mapping[str, int]
    quantized: int
    half: int

    @property
    def total(self) -> int:
        return sum(self.by_part.values())


def model_tensors(config: MlaConfig) -> tuple[Tensor, ...]:
    """Every parameter once; a head that is tied is none of its own.

    Raises: SRC-CLASS, CFG-HF as building the source does.
    """
    shapes, tied = model_weights(empty_model(config, FakeTensorMode()))
    return tuple(_tensor(name, shape, config) for name, shape in shapes.items() if name not in tied)


def stored_bytes(
    tensors: tuple[Tensor, ...],
    config: MlaConfig,
    target: Target,
    dtype: str,
    plan: WeightPlan | None,
) -> StoredBytes:
    """Bytes of the weight file of an export for `target`. `plan` None: all in `dtype`."""
    rounding = None if plan is None else _rounding(config, target, dtype, plan, tensors)
    by_part = dict.fromkeys(PARTS, 0)
    quantized = half = 0
    for tensor in tensors:
        for weight in _stored(tensor, config, dtype, rounding):
            count = tensor.copies * weight.nbytes
            by_part[tensor.part] += count
            quantized += count if weight.use.part else 0
            half += count if weight.dtype in ("fp16", "bf16") and not weight.use.part else 0
    return StoredBytes(by_part, quantized, half)


def is_tied(tensors: tuple[Tensor, ...]) -> bool:
    """Whether the head reads the embedding's weight."""
    return not any(tensor.part == "head" for tensor in tensors)


def _tensor(name: str, shape: Shape, config: MlaConfig) -> Tensor:
    layer = _LAYER.search(name)
    index = int(layer[1]) if layer else None
    stacked = len(shape) == 3 and ".experts." in name
    rows = config.router_rows
    copies = (config.num_experts if shape[0] == rows else shape[0]) if stacked else 1
    return Tensor(name, shape[1:] if stacked else shape, copies, _part(name), index)


def _part(name: str) -> str:
    if "embed" in name:
        return "embedding"
    if name.startswith("lm_head") or ".lm_head." in name:
        return "head"
    if ".experts." in name:
        return "experts"
    return "attention" if ".self_attn" in name else "other"


def _rounding(
    config: MlaConfig, target: Target, dtype: str, plan: WeightPlan, tensors: tuple[Tensor, ...]
) -> PlanRounding:
    on_device = target.release is not None
    return PlanRounding(
        plan=fitted(target, plan),
        heads=config.num_heads,
        nope=config.qk_nope_head_dim,
        router_rows=config.router_rows,
        tied=is_tied(tensors),
        scale_dtype=dtype if on_device else "fp32",
        for_device=on_device,
    )


def _stored(
    tensor: Tensor, config: MlaConfig, dtype: str, rounding: PlanRounding | None
) -> Iterator[StoredWeight]:
    """What one matrix becomes: itself in float, its halves, or the parts of it quantised."""
    form = None if rounding is None else rounding.form(tensor.name, tensor.shape)
    if rounding is None or form is None:
        found = stored_dtype(stored_shape(tensor.name, tensor.shape), config.router_rows, dtype)
        yield StoredWeight(tensor.name, WeightUse(tensor.name), tensor.shape, found)
        return
    if not tensor.name.endswith("kv_b_proj.weight"):
        layout = QDQ if rounding.for_device else NBITS
        yield from _parts(tensor.name, tensor.shape, form, layout, rounding=rounding, dtype=dtype)
        return
    layer = config.layers[tensor.layer or 0]
    halves = ((layer.heads, layer.nope, layer.rank), (layer.heads, layer.rank, layer.value))
    layouts = (QDQ_HEADS, QDQ) if rounding.for_device else (HEADS, HEADS)
    for half, shape, layout in zip(HALVES, halves, layouts, strict=True):
        yield from _parts(
            f"{tensor.name}.{half}", shape, form, layout, rounding=rounding, dtype=dtype
        )


def _parts(
    name: str, shape: Shape, form: WeightForm, layout: str, *, rounding: PlanRounding, dtype: str
) -> Iterator[StoredWeight]:
    """Blocks lie along the axis that is summed; too few columns, or on a device a last block that
    is not whole, leave the weight in float."""
    columns = shape[1] if layout in (HEADS, QDQ_HEADS) else shape[-1]
    partial = rounding.for_device and columns % form.width(columns)
    if partial or columns < LEAST_COLUMNS:
        yield StoredWeight(name, WeightUse(name), shape, dtype)
        return
    for part_name in part_names(form):
        part = Part(part_name, form, layout, rounding.scale_dtype)
        use = WeightUse(name, part=part)
        yield StoredWeight(f"{name}.{part_name}", use, part.shape(shape), part.dtype)
