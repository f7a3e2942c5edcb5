"""A device and what an export stores for it: dtypes, the form of the weights, what is left out."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mla_deploy.config import MlaConfig
from mla_deploy.devices import Device
from mla_deploy.errors import InputError
from mla_deploy.latent_store import STATIC
from mla_deploy.layer_facts import LINEAR
from mla_deploy.targets import check_dtype
from mla_deploy.weight_forms.fit import check_forms, fitted
from mla_deploy.weight_forms.form import WeightPlan, parse_plan


@dataclass(frozen=True)
class Row:
    """`weights` None: all in `dtype`. `notes`: what an export for it does differently."""

    device: Device
    dtype: str
    cache_dtype: str
    weights: WeightPlan | None
    notes: tuple[str, ...] = ()


def row_of(
    device: Device, config: MlaConfig, *, dtype: str | None, weights: str | None, cache: str | None
) -> Row:
    """Raises: InputError EXP-WEIGHT-FORM, TARGET-DTYPE for what the device's target has not."""
    target = device.row
    stored = dtype or target.default_dtype
    form = None if weights is None else parse_plan(weights)
    check_dtype(target, stored)
    if form is not None:
        check_forms(target, form)
    row = Row(device, stored, cache or config.latent_cache_dtype or stored, form)
    return replace(row, notes=(*_left_in_float(row), *_not_exported(row, config)))


def nearest_row(
    device: Device, config: MlaConfig, *, dtype: str | None, weights: str | None, cache: str | None
) -> Row:
    """As `row_of`; where the target has not what was asked, in its own dtype, with a note.

    Raises: InputError EXP-WEIGHT-FORM for weights in no known form.
    """
    if weights is not None:
        parse_plan(weights)  # what is no form at all is refused for every device
    try:
        return row_of(device, config, dtype=dtype, weights=weights, cache=cache)
    except InputError as refusal:
        row = row_of(device, config, dtype=None, weights=None, cache=cache)
        told = f"weights in {row.dtype}: {refusal.message}"
        return replace(row, notes=(told, *row.notes))


def _left_in_float(row: Row) -> tuple[str, ...]:
    if row.weights is None:
        return ()
    left = sorted(set(row.weights.forms) - set(fitted(row.device.row, row.weights).forms))
    return (f"TensorRT keeps {' and '.join(left)} in {row.dtype}",) if left else ()


def _not_exported(row: Row, config: MlaConfig) -> tuple[str, ...]:
    """What `export` refuses for a target today: then the figures are arithmetic alone."""
    is_static = row.cache_dtype == STATIC.name
    told = []
    if row.device.row.release is None:
        if is_static:
            told.append(f"`export` for a CPU has no cache in {STATIC.name}: int8 is its own")
        return tuple(f"{each}: figures are arithmetic alone" for each in told)
    if any(layer.kind == LINEAR for layer in config.layers):
        told.append("no lowering of linear attention for TensorRT yet")
    if row.cache_dtype != row.dtype and not is_static:
        told.append(f"`export` for TensorRT caches in {row.dtype} or {STATIC.name} only")
    return tuple(f"{each}: figures are arithmetic alone" for each in told)
