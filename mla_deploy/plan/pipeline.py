"""`plan`: what a model needs on each device, what fits, and how fast it can be at most."""

from __future__ import annotations

import os
from collections.abc import Callable

from mla_deploy.config import MlaConfig
from mla_deploy.devices import DEVICES, Device, find_device, this_machine
from mla_deploy.errors import InputError, quoted
from mla_deploy.latent_store import EXPORTED_DTYPES
from mla_deploy.plan.fit import MOST_ROWS
from mla_deploy.plan.models import PlannedModel, find_model
from mla_deploy.plan.report import PlanReport, Question
from mla_deploy.plan.row import nearest_row, row_of

ALL, CPU = "all", "cpu"
DEFAULT_CONTEXT = 4096
DTYPES = ("fp32", "fp16", "bf16")
_MOST_CONTEXT = 1 << 31
_MOST_GIB = 1 << 20
Progress = Callable[[str, int, int], None]  # stage, done, total


def plan(
    model: str | os.PathLike[str],
    *,
    device: str | None = None,
    context: int | None = None,
    batch: int | None = None,
    weights: str | None = None,
    cache: str | None = None,
    dtype: str | None = None,
    reserve_gib: float | None = None,
    progress: Progress | None = None,
) -> PlanReport:
    """Plan `model`: a checkpoint folder, a config.json, or a published model's name.

    `device` is a name, several with commas, "cpu" (this machine, ONNX Runtime) or "all" (the
    default). `context` tokens (4096, or what the model has positions for) in each of `batch` (1)
    rows. `weights` a form as `export` takes it, `cache` a cache dtype, `dtype` that of weights in
    float: the target's own. `reserve_gib`: memory that others hold, in place of the device's own.
    No weight is read; the figures are those of what `export` writes and the runners reserve.

    Raises: InputError PLAN-DEVICE, PLAN-MODEL, PLAN-LAYERS, PLAN-OPTION, EXP-WEIGHT-FORM,
    EXP-CACHE, TARGET-DTYPE, FILE-*, CFG-*, SRC-CLASS.
    """
    found = find_model(model)
    config = found.config
    asked = _question(config, context, batch, weights, cache)
    _check_reserve(reserve_gib)
    _check_word("dtype", dtype, DTYPES)
    _require_layers(found)
    # All that can be refused at once comes before transformers is loaded, which takes seconds.
    make = nearest_row if (device or ALL) == ALL else row_of
    rows = [
        make(each, config, dtype=dtype, weights=weights, cache=cache)
        for each in _devices(device or ALL)
    ]
    report = progress or (lambda *_: None)
    report("parameters", 0, 1)
    from mla_deploy.plan.planner import Planner, model_facts
    from mla_deploy.plan.tensors import model_tensors

    tensors = model_tensors(config)
    report("parameters", 1, 1)
    plans = tuple(Planner(row, config, tensors, asked, reserve_gib).plan() for row in rows)
    notes = (*found.notes, *config.notes, *_warnings(config, asked))
    return PlanReport(model_facts(found, tensors), asked, plans, notes)


def _devices(names: str) -> tuple[Device, ...]:
    if names == ALL:
        return DEVICES
    words = dict.fromkeys(word.strip() for word in names.split(","))
    return tuple(this_machine() if word == CPU else find_device(word) for word in words)


def _question(
    config: MlaConfig,
    context: int | None,
    batch: int | None,
    weights: str | None,
    cache: str | None,
) -> Question:
    """Raises: InputError PLAN-OPTION."""
    tokens = min(config.max_position_embeddings, DEFAULT_CONTEXT) if context is None else context
    rows = 1 if batch is None else batch
    _check_count("context", tokens, _MOST_CONTEXT)
    _check_count("batch", rows, MOST_ROWS)
    _check_word("cache", cache, EXPORTED_DTYPES)
    return Question(tokens, rows, weights, cache)


def _check_count(name: str, found: object, limit: int) -> None:
    if type(found) is not int or not 1 <= found <= limit:
        raise InputError(
            "PLAN-OPTION",
            f"{name} is {quoted(found)}; wanted a whole number from 1 to {limit:,}",
            option=name,
        )


def _check_word(name: str, found: str | None, known: tuple[str, ...]) -> None:
    if found is not None and found not in known:
        told = f"{name} is {quoted(found)}; wanted one of {', '.join(known)}"
        raise InputError("PLAN-OPTION", told, option=name)


def _check_reserve(found: object) -> None:
    if found is None:
        return
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found < _MOST_GIB:
        raise InputError(
            "PLAN-OPTION", f"reserve is {quoted(found)}; wanted GiB, 0 or more", option="reserve"
        )


def _require_layers(model: PlannedModel) -> None:
    """Raises: InputError PLAN-LAYERS where the config leaves open which layers slide."""
    if not model.config.layers:
        raise InputError(
            "PLAN-LAYERS",
            f"{quoted(model.name)} has sliding layers, but no layer_types that says which",
            hint="use the complete config.json, or give layer_types a word for each layer",
        )


def _warnings(config: MlaConfig, asked: Question) -> list[str]:
    told = []
    if config.quantization is not None:
        method = config.quantization.method
        told.append(f"weights are {method} on disk and planned as `export` stores them unless told "
                    "otherwise: widened")  # fmt: skip
    if asked.context <= config.max_position_embeddings:
        return told
    return [
        *told,
        f"a context of {asked.context:,} tokens is beyond the model's "
        f"{config.max_position_embeddings:,} positions: what it says there is not known",
    ]
