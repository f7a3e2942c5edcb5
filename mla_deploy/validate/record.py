"""Run first, compare later: `record` on a device, `judge_results` anywhere; neither needs torch."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mla_deploy.bundle import Bundle, open_bundle
from mla_deploy.errors import IntegrityError, quoted
from mla_deploy.validate.cases import Case
from mla_deploy.validate.gates import gate_for
from mla_deploy.validate.held import Held, Progress, chosen_cases, config_of, facts_of
from mla_deploy.validate.held_goldens import about_bundle, held_recorded, require_same
from mla_deploy.validate.memory import MemoryReport, measure_memory
from mla_deploy.validate.opening import open_sessions, plan_of
from mla_deploy.validate.parity import CaseResult, Ran, judge_case, ran_case
from mla_deploy.validate.recorded import call_arrays, case_entry, output_arrays, write_recorded
from mla_deploy.validate.recorded_file import Recorded, open_recorded
from mla_deploy.validate.report import ValidationReport, report_of
from mla_deploy.validate.uncached import Uncached, cached_against_uncached

NOT_RUN = "it was not run: the results have no case of these tokens"


def record(
    bundle: Bundle | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    cases: Sequence[Case] | None = None,
    threads: int | None = None,
    verify: Literal["full", "sizes"] = "full",
    progress: Progress | None = None,
) -> Path:
    """Run `bundle` over `cases` (None: `default_cases`) and write its outputs; judges nothing.

    Raises: BUN-* (as `open_bundle`), InputError VAL-CASE, IncompatibleError VAL-DTYPE,
    RUN-SESSION, EnvironmentFailure FILE-*.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle, verify=verify)
    sessions = open_sessions(opened, threads)
    chosen = chosen_cases(opened, facts_of(opened), cases)
    ran = []
    for index, case in enumerate(chosen):
        if progress is not None:
            progress("cases", index, len(chosen))
        ran.append(ran_case(case, sessions))
    if progress is not None:
        progress("cases", len(chosen), len(chosen))
    gate = gate_for(
        str(opened.manifest["dtype"]),
        str(opened.manifest["cache"]["dtype"]),
        quantized=plan_of(opened.manifest) is not None,
    )
    uncached = cached_against_uncached(opened, sessions, gate)
    memory = measure_memory(opened, config_of(opened), sessions)
    return save_results(path, opened, list(zip(chosen, ran, strict=True)), (memory, uncached))


def save_results(
    path: str | os.PathLike[str],
    bundle: Bundle,
    ran: Sequence[tuple[Case, Ran]],
    measured: tuple[MemoryReport, Uncached],
) -> Path:
    """Write what a bundle gave. Raises: EnvironmentFailure FILE-*."""
    arrays: dict[str, Any] = {}
    entries = []
    for case, found in ran:
        arrays |= call_arrays(case)
        if found.logits_BXV is not None:
            arrays |= output_arrays(case.name, found.logits_BXV, found.cached)
        told = {"refusal": found.refusal, "seconds": found.seconds}
        entries.append(case_entry(case, sorted(found.cached), **told))
    memory, uncached = measured
    gate = gate_for(
        str(bundle.manifest["dtype"]),
        str(bundle.manifest["cache"]["dtype"]),
        quantized=plan_of(bundle.manifest) is not None,
    )
    # A distance without bound has no place in JSON: null.
    about = {
        **about_bundle(bundle),
        "gates": gate.to_dict(),
        "cases": entries,
        "memory": memory.to_dict(),
        "uncached": uncached.to_dict() if np.isfinite(uncached.max_abs) else None,
    }
    return write_recorded(path, "results", about, arrays)


def judge_results(
    results: str | os.PathLike[str],
    goldens: str | os.PathLike[str],
    *,
    bundle: Bundle | str | os.PathLike[str] | None = None,
) -> ValidationReport:
    """Hold results against goldens; `bundle`, when given, must be the one that was run.

    Raises: as `open_recorded`; IntegrityError VAL-GOLDENS (of another source or other dtypes),
    VAL-RESULTS (of another bundle); as `open_bundle`.
    """
    started = time.perf_counter()
    with open_recorded(results, "results") as found, open_recorded(goldens, "goldens") as wanted:
        _require_bundle(found, bundle)
        for what in ("source_digest", "dtype", "cache_dtype", "stored", "vocab_size"):
            require_same(what.replace("_", " "), str(wanted.about[what]), str(found.about[what]))
        held = held_recorded(wanted)
        places = {(case.name, case.calls): case for case in found.cases}
        cases = tuple(
            _judged(found, places.get((case.name, case.calls)), case, held) for case in held.cases
        )
        about, notes = found.about, held.notes
        memory = _memory(about.get("memory"))
        return report_of(
            held,
            cases,
            subject={
                "bundle_digest": about["bundle_digest"],
                "verified": about["verified"],
                "target": about["target"],
                "dtype": about["dtype"],
                "versions": {str(k): str(v) for k, v in about["libraries"].items()},
            },
            memory=memory,
            uncached=_uncached(about.get("uncached")),
            notes=(*notes, "memory and the cached-against-uncached numbers are as the results say"),
            seconds=time.perf_counter() - started,
        )


def _judged(found: Recorded, place: Case | None, case: Case, held: Held) -> CaseResult:
    """A golden case, by what the results have of it."""
    if place is None:
        return judge_case(case, Ran(None, {}, NOT_RUN, 0.0), held.stored, held.gate)
    entry = found.entry(place)
    refusal, seconds = entry.get("refusal"), entry.get("seconds")
    seconds = float(seconds) if isinstance(seconds, (int, float)) else 0.0
    if refusal is not None:
        ran = Ran(None, {}, quoted(refusal).strip("'\""), seconds)
    else:
        ran = Ran(found.logits(place), found.cached(place), None, seconds)
    return judge_case(case, ran, held.stored, held.gate, held.original)


def _require_bundle(results: Recorded, bundle: Bundle | str | os.PathLike[str] | None) -> None:
    if bundle is None:
        return
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    if results.about["bundle_digest"] != opened.digest:
        raise IntegrityError(
            "VAL-RESULTS",
            f"the results are of bundle {quoted(results.about['bundle_digest'])}, this one is "
            f"{opened.digest}",
            hint="name the bundle that was run, or run this one",
            found=results.about["bundle_digest"],
            wanted=opened.digest,
        )


def _memory(told: object) -> MemoryReport | None:
    names = MemoryReport.__dataclass_fields__
    if not isinstance(told, Mapping) or any(type(told.get(name)) is not int for name in names):
        return None
    return MemoryReport(**{name: told[name] for name in names})


def _uncached(told: object) -> Uncached | None:
    if not isinstance(told, Mapping):
        return None
    values = [told.get(name) for name in ("positions", "max_abs", "wanted")]
    if not all(isinstance(value, (int, float)) for value in values):
        return None
    return Uncached(int(values[0]), float(values[1]), float(values[2]))  # type: ignore[arg-type]
