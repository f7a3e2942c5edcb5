"""`validate`: a bundle held against the checkpoint that it was made from."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Literal

from mla_deploy.bundle import Bundle, open_bundle
from mla_deploy.checkpoint import Checkpoint, open_checkpoint
from mla_deploy.config import MlaConfig
from mla_deploy.errors import InputError, IntegrityError
from mla_deploy.runtime.sessions import GraphSessions
from mla_deploy.runtime.verified import is_verifying
from mla_deploy.validate.cases import Case, default_cases, verify_case
from mla_deploy.validate.gates import Gate, gate_for, loss_gate_for
from mla_deploy.validate.loss import loss_over, text_rows
from mla_deploy.validate.memory import measure_memory
from mla_deploy.validate.opening import open_sessions, plan_of, rounding_of
from mla_deploy.validate.parity import CaseResult, run_case
from mla_deploy.validate.reference import Progress, Reference, Source
from mla_deploy.validate.report import ValidationReport, rounding_loss, top_one
from mla_deploy.validate.stand_in import NOTE
from mla_deploy.validate.text import text_case

_LIBRARIES = ("mla-deploy", "torch", "transformers", "onnxruntime-gpu", "onnxruntime", "numpy")


def validate(
    bundle: Bundle | str | os.PathLike[str],
    *,
    source: Checkpoint | str | os.PathLike[str] | None = None,
    module: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    cases: Sequence[Case] | None = None,
    threads: int | None = None,
    verify: Literal["full", "sizes"] = "full",
    progress: Progress | None = None,
) -> ValidationReport:
    """Run `bundle` and its PyTorch source over `cases` and compare; None takes `default_cases`.

    The source is a checkpoint, or the user's own `module` (`package.file:factory`, whose code runs)
    with its `weights`, as they were exported. A bundle for TensorRT is checked on ONNX Runtime's
    CPU provider (`stand_in.py`), and a note of the report says so.
    `threads` is for both sides; None leaves each its own default.
    The answer no is a report whose `passed` is false, not an exception.
    Raises: BUN-* and CKPT-* (as `open_bundle`, `open_checkpoint`), IntegrityError VAL-SOURCE (the
    bundle was made from another checkpoint), InputError VAL-CASE (no cases), IncompatibleError
    VAL-DTYPE, RUN-SESSION.
    """
    started = time.perf_counter()
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle, verify=verify)
    dtype, cache_dtype = str(opened.manifest["dtype"]), str(opened.manifest["cache"]["dtype"])
    plan = plan_of(opened.manifest)
    gate = gate_for(dtype, cache_dtype, quantized=plan is not None)
    with _opened(source, module, weights) as found:
        _require_source(opened, found)
        sessions = open_sessions(opened, threads)
        with _torch_threads(threads):
            reference = _reference(found)
            chosen = _chosen(opened, found, cases, reference)
            loss = None  # measured before the source is rounded
            if plan is not None:
                loss = loss_over(*text_rows(opened), reference.every_logit, sessions, progress)
            stored = _rounded_alike(opened, found.config, reference, chosen)
            results = _run(chosen, sessions, (stored, reference), gate, progress)
        memory = measure_memory(opened, found.config, sessions)
        digest, told = found.digest, (*_stood_in(opened), *found.notes)
    return ValidationReport(
        bundle_digest=opened.digest,
        source_digest=digest,
        verified=opened.verified,
        target=str(opened.manifest["target"]),
        dtype=dtype,
        gate=gate,
        cases=results,
        top1=top_one(results, gate),
        rounding=rounding_loss(results, gate),
        loss=loss,
        loss_gate=None if plan is None else loss_gate_for(plan.kind, cache_dtype),
        memory=memory,
        versions=_versions(),
        notes=(*told, *_scaled_gates(results, gate)),
        seconds=time.perf_counter() - started,
    )


def _rounded_alike(
    bundle: Bundle, config: MlaConfig, reference: Reference, cases: Sequence[Case]
) -> Reference:
    """The source as the bundle stores it: dtype, cache, quantised weights."""
    manifest = bundle.manifest
    with rounding_of(config, bundle) as quantized:
        return reference.stored_as(
            str(manifest["dtype"]),
            cases,
            cache_dtype=str(manifest["cache"]["dtype"]),
            weights=not _is_own(bundle),
            quantized=quantized,
        )


def _is_own(bundle: Bundle) -> bool:
    """Beside a checkpoint, or kept as there, the weights are the checkpoint's own."""
    return "in_place" in bundle.manifest or "kept" in bundle.manifest["weights"]


def _stood_in(bundle: Bundle) -> tuple[str, ...]:
    """Says so when the device that the bundle is for was not asked."""
    if "engine" not in bundle.manifest:
        return ()
    return (NOTE.format(target=bundle.manifest["target"]),)


def _run(
    cases: Sequence[Case],
    sessions: GraphSessions,
    references: tuple[Reference, Reference],
    gate: Gate,
    progress: Progress | None,
) -> tuple[CaseResult, ...]:
    stored, source = references
    original = None if stored is source else source
    results = []
    for index, case in enumerate(cases):
        if progress is not None:
            progress("cases", index, len(cases))
        results.append(run_case(case, sessions, stored, gate, original))
    if progress is not None:
        progress("cases", len(cases), len(cases))
    return tuple(results)


def _chosen(
    bundle: Bundle, source: Source, cases: Sequence[Case] | None, reference: Reference
) -> tuple[Case, ...]:
    if cases is None:
        text = text_case(bundle, source.config, reference)
        checked = verify_case(source.config) if _verifies(bundle) else ()
        return (*default_cases(source.config), *checked, *(() if text is None else (text,)))
    if not cases:
        raise InputError("VAL-CASE", "found no cases, wanted at least one")
    return tuple(cases)


def _verifies(bundle: Bundle) -> bool:
    return "engine" not in bundle.manifest and is_verifying(bundle)


@contextlib.contextmanager
def _opened(
    source: Checkpoint | str | os.PathLike[str] | None,
    module: str | None,
    weights: str | os.PathLike[str] | None,
) -> Iterator[Source]:
    """The caller's open checkpoint stays open; one that we open is closed."""
    if (source is None) == (module is None):
        raise InputError(
            "VAL-OPTION", "a bundle is held against a checkpoint or a module; wanted one of the two"
        )
    if source is None:
        from mla_deploy.source.user.module_source import open_module_source

        yield open_module_source(str(module), weights)
    elif isinstance(source, Checkpoint):
        yield source
    else:
        with open_checkpoint(os.fspath(source)) as checkpoint:
            yield checkpoint


def _reference(source: Source) -> Reference:
    if isinstance(source, Checkpoint):
        return Reference.of_checkpoint(source)
    from mla_deploy.source.user.module_source import ModuleSource

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


def _scaled_gates(results: tuple[CaseResult, ...], gate: Gate) -> tuple[str, ...]:
    """Says so when the absolute gate was widened because the logits are large."""
    bounds = [case.max_abs_bound for case in results if case.max_abs_bound is not None]
    if gate.max_abs is None or not bounds or max(bounds) <= gate.max_abs:
        return ()
    return (
        f"logits are so large that {gate.max_abs_share:g} of the largest one, {max(bounds):.3g}, "
        f"stood in for the absolute gate of {gate.max_abs:g}",
    )


def _versions() -> dict[str, str]:
    found = {}
    for library in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[library] = metadata.version(library)
    return found
