"""A bundle held against its source: a checkpoint, an ONNX file, or the user's own module."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_deploy.bundle import Bundle
from mla_deploy.checkpoint import Checkpoint, open_checkpoint
from mla_deploy.errors import InputError, IntegrityError
from mla_deploy.validate.cases import Case
from mla_deploy.validate.gates import gate_for, loss_gate_for
from mla_deploy.validate.held import Asked, Held, chosen_cases, is_own, rotation_of
from mla_deploy.validate.loss import loss_over, text_rows
from mla_deploy.validate.opening import plan_of, rounding_of
from mla_deploy.validate.reference import Reference, Source


@dataclass(frozen=True)
class SourceNamed:
    """As the caller names it: a checkpoint, or `module` with its `weights`."""

    source: Checkpoint | str | os.PathLike[str] | None
    module: str | None
    weights: str | os.PathLike[str] | None
    threads: int | None


@contextlib.contextmanager
def held_source(asked: Asked, named: SourceNamed) -> Iterator[Held]:
    """The source, run in fp32 and rounded as the bundle stores it. Raises: as `validate`."""
    bundle, plan = asked.bundle, plan_of(asked.bundle.manifest)
    dtype, cache_dtype = (
        str(bundle.manifest["dtype"]),
        str(bundle.manifest["cache"]["dtype"]),
    )
    gate = gate_for(dtype, cache_dtype, quantized=plan is not None)
    with _opened(named) as found:
        _require_source(bundle, found)
        with _torch_threads(named.threads):
            reference = _reference(found)
            cases = chosen_cases(bundle, found.config, asked.cases)
            loss = text = None  # measured before the source is rounded
            if plan is not None:
                rows = text_rows(bundle)
                loss = loss_over(*rows, reference.every_logit, asked.sessions, asked.progress)
            if asked.text is not None:
                rows = text_rows(bundle, asked.text[1])
                text = loss_over(*rows, reference.every_logit, asked.sessions, asked.progress)
            stored = _rounded_alike(bundle, found, reference, cases)
            yield Held(
                kind="source",
                digest=found.digest,
                source_digest=found.digest,
                cases=cases,
                stored=stored,
                original=None if stored is reference else reference,
                gate=gate,
                overall=gate,
                config=found.config,
                loss=loss,
                loss_gate=None if plan is None else loss_gate_for(plan.kind, cache_dtype),
                text=text,
                notes=found.notes,
            )


def _rounded_alike(
    bundle: Bundle, source: Source, reference: Reference, cases: tuple[Case, ...]
) -> Reference:
    """The source as the bundle stores it: latents rotated, dtype, cache, quantised weights."""
    manifest = bundle.manifest
    if rotation_of(manifest) is not None:
        reference = reference.rotated(cases)
    with rounding_of(source.config, bundle) as quantized:
        return reference.stored_as(
            str(manifest["dtype"]),
            cases,
            cache_dtype=str(manifest["cache"]["dtype"]),
            weights=not is_own(manifest),
            quantized=quantized,
            scales=_static_scales(manifest),
        )


def _static_scales(manifest: Mapping[str, Any]) -> dict[int, NDArray[np.float32]] | None:
    """Those of each cache index, where latents are static codes."""
    found = {
        int(tensor["layer"]): np.array(tensor["scales"], np.float32)
        for tensor in manifest["cache"]["tensors"]
        if "scales" in tensor
    }
    return found or None


@contextlib.contextmanager
def _opened(named: SourceNamed) -> Iterator[Source]:
    """The caller's open checkpoint stays open; one that we open is closed."""
    source = named.source
    if source is None:
        from mla_deploy.source.user.module_source import open_module_source

        yield open_module_source(str(named.module), named.weights)
    elif isinstance(source, Checkpoint):
        yield source
    elif os.path.isfile(source):
        from mla_deploy.foreign.runner import open_reference

        with open_reference(Path(source)) as foreign:
            yield foreign
    else:
        with open_checkpoint(os.fspath(source)) as checkpoint:
            yield checkpoint


def _reference(source: Source) -> Reference:
    if isinstance(source, Checkpoint):
        return Reference.of_checkpoint(source)
    from mla_deploy.foreign.runner import ForeignReference
    from mla_deploy.source.user.module_source import ModuleSource

    if isinstance(source, ForeignReference):
        return Reference(source)
    if isinstance(source, ModuleSource):
        return Reference.of_module(source)
    raise InputError("VAL-OPTION", f"{type(source).__name__} is no source of a bundle")


@contextlib.contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    """The source runs on as many threads as the bundle; None leaves torch's own number."""
    import torch

    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _require_source(bundle: Bundle, source: Source) -> None:
    wanted = bundle.manifest["source"]["checkpoint_digest"]
    if source.digest != wanted:
        raise IntegrityError(
            "VAL-SOURCE",
            f"the bundle was made from source {wanted}, this one is {source.digest}",
            hint="name the checkpoint that the bundle was exported from, or export this one",
            found=source.digest,
            wanted=wanted,
        )
