"""A bundle held against another one: last week's, or the float one that it was quantised from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from mla_deploy.bundle import Bundle
from mla_deploy.errors import InputError, quoted
from mla_deploy.runtime import OnnxRunner
from mla_deploy.runtime.sessions import GraphSessions
from mla_deploy.validate.cases import Tokens
from mla_deploy.validate.gates import LOSS_GATES, Gate, gate_for
from mla_deploy.validate.held import (
    Asked,
    Held,
    chosen_cases,
    config_of,
    facts_of,
    rotation_of,
    stored_facts,
)
from mla_deploy.validate.loss import bundle_scorer, loss_over, text_rows
from mla_deploy.validate.opening import open_sessions, plan_of
from mla_deploy.validate.reference import RowTrace
from mla_deploy.weight_forms.form import KINDS

OTHERWISE_STORED = (
    "the two bundles store their numbers otherwise, so one expert that rounding makes the router "
    "exchange moves a single case beyond any bound: cases are told, and mean KL and top-1 over all "
    "positions are judged"
)
OTHERWISE_ROTATED = (
    "one of the two bundles caches rotated latents, so its cached rows are other numbers by "
    "design: logits are judged, cached rows are not"
)
# Of a config, what says nothing about the numbers that the model computes.
_SAYS_NOTHING = {"transformers_version", "torch_dtype", "dtype", "_name_or_path",
                 "quantization_config", "architectures", "use_cache"}  # fmt: skip


class BundleRows:
    """What a bundle says of each row, asked alone; each is run once."""

    def __init__(self, sessions: GraphSessions) -> None:
        self._sessions = sessions
        self._traces: dict[tuple[Tokens, ...], RowTrace] = {}

    def row(self, segments: tuple[Tokens, ...]) -> RowTrace:
        """Raises: GateError RUN-STEP, RUN-NONFINITE."""
        if segments not in self._traces:
            tokens = sum(map(len, segments))
            padding = max(map(len, segments)) if self._sessions.writes_padding else 0
            runner = OnnxRunner(self._sessions, capacity=tokens + padding, check_finite=True)
            runner.poison()
            logits = [runner.prefill([segment])[0] for segment in segments]
            cached = {layer: runner.cached_rows(layer, 0) for layer in runner.cache_layers}
            self._traces[segments] = RowTrace(np.stack(logits), cached)
        return self._traces[segments]


def held_bundle(asked: Asked, other: Bundle, gate: str | None, threads: int | None) -> Held:
    """`gate` is a dtype of the table of gates; None takes that of the looser of the two.

    Raises: InputError VAL-AGAINST (another vocabulary or config); IncompatibleError VAL-DTYPE.
    """
    bundle = asked.bundle
    _require_same_model(bundle, other)
    sessions = open_sessions(other, threads)
    rows = BundleRows(sessions)
    overall = _gate(bundle, other) if gate is None else gate_for(gate)
    is_alike = stored_facts(bundle) == stored_facts(other)
    told_only = not is_alike and gate is None
    if rotation_of(bundle.manifest) != rotation_of(other.manifest):
        overall = replace(overall, cache_rel_l2=math.inf, cache_row_median=None)
    kinds = {plan.kind for b in (bundle, other) if (plan := plan_of(b.manifest)) is not None}
    loss = text = None
    if kinds and not is_alike:
        loss = loss_over(
            *text_rows(bundle), bundle_scorer(sessions), asked.sessions, asked.progress
        )
    if asked.text is not None:
        on_text = text_rows(bundle, asked.text[1])
        text = loss_over(*on_text, bundle_scorer(sessions), asked.sessions, asked.progress)
    return Held(
        kind="bundle",
        digest=other.digest,
        source_digest=str(bundle.manifest["source"]["checkpoint_digest"]),
        cases=chosen_cases(bundle, facts_of(bundle), asked.cases),
        stored=rows,
        original=rows if told_only else None,
        gate=_unjudged(overall) if told_only else overall,
        overall=overall,
        config=config_of(bundle),
        loss=loss,
        loss_gate=LOSS_GATES[min(kinds, key=KINDS.index)] if loss is not None else None,
        text=text,
        notes=_notes(bundle, other, told_only),
    )


def _notes(bundle: Bundle, other: Bundle, told_only: bool) -> tuple[str, ...]:
    differ = rotation_of(bundle.manifest) != rotation_of(other.manifest)
    return (
        *((OTHERWISE_STORED,) if told_only else ()),
        *((OTHERWISE_ROTATED,) if differ else ()),
    )


def _gate(one: Bundle, other: Bundle) -> Gate:
    dtypes = [
        dtype
        for bundle in (one, other)
        for dtype in (str(bundle.manifest["dtype"]), str(bundle.manifest["cache"]["dtype"]))
    ]
    quantized = any(plan_of(bundle.manifest) is not None for bundle in (one, other))
    return gate_for(*dtypes, quantized=quantized)


def _unjudged(gate: Gate) -> Gate:
    return Gate(
        max_abs=None,
        max_abs_share=None,
        rel_l2=math.inf,
        cache_rel_l2=math.inf,
        mean_kl=math.inf,
        top1=gate.top1,
    )


def _require_same_model(bundle: Bundle, other: Bundle) -> None:
    here, there = _facts(bundle), _facts(other)
    for name in sorted({*here, *there}):
        if here.get(name) != there.get(name):
            raise InputError(
                "VAL-AGAINST",
                f"the two bundles are of different models: {quoted(name)} is "
                f"{quoted(here.get(name))} here and {quoted(there.get(name))} in "
                f"{quoted(str(other.path))}",
                hint="hold a bundle against one of the same model: other dtypes, weights, cache or "
                "target may differ, the model's config may not",
                name=name,
            )


def _facts(bundle: Bundle) -> Mapping[str, Any]:
    """What two bundles of one model agree on, by name."""
    config = config_of(bundle)
    raw = {} if config is None else {f"config.{key}": value for key, value in config.raw.items()}
    kept = {key: v for key, v in raw.items() if key.partition(".")[2] not in _SAYS_NOTHING}
    return {**{f"model.{key}": value for key, value in bundle.manifest["model"].items()}, **kept}
