"""A bundle held against stored goldens: no source, no torch. Also how goldens are made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mla_deploy.bundle import Bundle
from mla_deploy.errors import IntegrityError, quoted
from mla_deploy.validate.cases import Tokens
from mla_deploy.validate.gates import gate_for
from mla_deploy.validate.held import Asked, Held, config_of, stored_facts
from mla_deploy.validate.recorded import call_arrays, case_entry, output_arrays, write_recorded
from mla_deploy.validate.recorded_file import Recorded
from mla_deploy.validate.reference import RowTrace
from mla_deploy.validate.versions import library_versions

NO_LOSS = (
    "goldens hold no text: what quantised weights cost on text was not measured; validate with "
    "--source for it"
)


class GoldenRows:
    """What a file of goldens says of each row of its cases. `part`: "logits", or "source"."""

    def __init__(self, goldens: Recorded, part: str) -> None:
        self._goldens, self._part = goldens, part
        self._places = {
            segments: (case, row)
            for case in goldens.cases
            for row, segments in enumerate(case.rows())
        }

    def row(self, segments: tuple[Tokens, ...]) -> RowTrace:
        """Raises: InputError, IntegrityError VAL-GOLDENS."""
        case, row = self._places[segments]
        logits_BXV = self._goldens.logits(case, self._part)
        cached = self._goldens.cached(case) if self._part == "logits" else {}
        return RowTrace(logits_BXV[row], {layer: rows[row] for layer, rows in cached.items()})


def held_goldens(asked: Asked, goldens: Recorded) -> Held:
    """Raises: IntegrityError VAL-GOLDENS when they are of another source, or stored otherwise."""
    facts = stored_facts(asked.bundle)
    wanted = str(asked.bundle.manifest["source"]["checkpoint_digest"])
    require_same("source", str(goldens.about["source_digest"]), wanted)
    require_same("form of numbers", _told(goldens.about["stored"]), _told(facts))
    vocab = str(asked.bundle.manifest["model"]["vocab_size"])
    require_same("vocabulary", str(goldens.vocab_size), vocab)
    return replace(held_recorded(goldens), config=config_of(asked.bundle))


def held_recorded(goldens: Recorded) -> Held:
    """The goldens of any bundle."""
    about = goldens.about
    quantized = about["stored"].get("plan") is not None
    gate = gate_for(about["dtype"], about["cache_dtype"], quantized=quantized)
    is_rounded = any(goldens.has(case, "source") for case in goldens.cases)
    changed = dict(about["gates"]) != gate.to_dict()
    told = "the gates are this release's, not those that the goldens were made with"
    return Held(
        kind="goldens",
        digest=goldens.digest,
        source_digest=about["source_digest"],
        cases=goldens.cases,
        stored=GoldenRows(goldens, "logits"),
        original=GoldenRows(goldens, "source") if is_rounded else None,
        gate=gate,
        overall=gate,
        config=None,
        notes=(*((NO_LOSS,) if quantized else ()), *((told,) if changed else ())),
    )


def save_goldens(path: str | os.PathLike[str], bundle: Bundle, held: Held) -> Path:
    """Write what the source of `held` says of its cases. Raises: EnvironmentFailure FILE-*."""
    arrays: dict[str, Any] = {}
    entries = []
    for case in held.cases:
        traces = [held.stored.row(segments) for segments in case.rows()]
        layers = list(traces[0].cached)
        cached = {layer: [trace.cached[layer] for trace in traces] for layer in layers}
        logits_BXV = np.stack([trace.logits for trace in traces])
        arrays |= call_arrays(case) | output_arrays(case.name, logits_BXV, cached)
        if held.original is not None:
            source = [held.original.row(segments).logits for segments in case.rows()]
            arrays[f"{case.name}.source"] = np.ascontiguousarray(np.stack(source, axis=1))
        entries.append(case_entry(case, layers))
    about = {**about_bundle(bundle), "gates": held.gate.to_dict(), "cases": entries}
    return write_recorded(path, "goldens", about, arrays)


def about_bundle(bundle: Bundle) -> dict[str, Any]:
    """What goldens and results say of the bundle they were made with."""
    facts = stored_facts(bundle)
    return {
        "bundle_digest": bundle.digest,
        "source_digest": str(bundle.manifest["source"]["checkpoint_digest"]),
        "target": str(bundle.manifest["target"]),
        "verified": bundle.verified,
        "dtype": facts["dtype"],
        "cache_dtype": facts["cache_dtype"],
        "stored": facts,
        "vocab_size": int(bundle.manifest["model"]["vocab_size"]),
        "libraries": library_versions(),
    }


def require_same(what: str, found: str, wanted: str) -> None:
    """Raises: IntegrityError VAL-GOLDENS."""
    if found == wanted:
        return
    raise IntegrityError(
        "VAL-GOLDENS",
        f"the goldens are of {what} {quoted(found)}, wanted {quoted(wanted)}",
        hint="save goldens of the checkpoint and the dtypes that this bundle was exported with",
        found=found,
        wanted=wanted,
    )


def _told(facts: Mapping[str, Any]) -> str:
    plan = facts.get("plan") or {}
    words = [
        str(facts.get("dtype")),
        f"cache {facts.get('cache_dtype')}",
        f"weights {plan.get('roles', 'in float') if isinstance(plan, dict) else plan}",
    ]
    if facts.get("weights_as_source"):
        words.append("as in the checkpoint")
    if facts.get("scales_on_device"):
        words.append("scales for a device")
    return ", ".join(words)
