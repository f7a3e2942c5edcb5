"""The validation report: what was run, what was found, whether it passed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mla_deploy.strict_json import finite
from mla_deploy.validate.bisected import Bisected
from mla_deploy.validate.difference import LogitDifference
from mla_deploy.validate.gates import Gate, LossGate
from mla_deploy.validate.held import Held
from mla_deploy.validate.loss import Loss, told_of
from mla_deploy.validate.memory import MemoryReport
from mla_deploy.validate.metrics import Metrics, metrics_over
from mla_deploy.validate.outputs.schema import SCHEMA_VERSION
from mla_deploy.validate.parity import CaseResult
from mla_deploy.validate.surroundings import Surroundings
from mla_deploy.validate.text_result import TextResult
from mla_deploy.validate.uncached import Uncached


@dataclass(frozen=True)
class TopOne:
    """Agreement on the most likely token over all positions of all cases, near ties left out."""

    positions: int
    flips: int
    near_ties: int
    wanted: float

    @property
    def share(self) -> float:
        judged = self.positions - self.near_ties
        return 1.0 if judged <= 0 else 1 - self.flips / judged

    @property
    def passed(self) -> bool:
        return self.positions > 0 and self.share >= self.wanted

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share, "passed": self.passed}


@dataclass(frozen=True)
class ValidationReport:
    """What `validate` returns. Ties itself to one bundle and one checkpoint by their digests."""

    bundle_digest: str
    source_digest: str
    verified: str  # how the bundle's bytes were checked: "full", "headers" or "sizes"
    target: str
    dtype: str
    gate: Gate
    cases: tuple[CaseResult, ...]
    top1: TopOne
    rounding: RoundingLoss | None  # None for fp32
    loss: Loss | None  # of quantised weights, else None
    loss_gate: LossGate | None
    memory: MemoryReport | None  # None where results from elsewhere do not tell it
    versions: dict[str, str]
    notes: tuple[str, ...]
    seconds: float
    reference: ReferenceName
    text: TextResult | None = None
    uncached: Uncached | None = None
    bisect: Bisected | None = None
    about: Surroundings | None = None

    @property
    def passed(self) -> bool:
        """Every case, the agreement and the rounding loss over all, the losses on text, cached
        against uncached, and the memory."""
        every_case = bool(self.cases) and all(case.passed for case in self.cases)
        parts = (self.top1, self.rounding, self.text, self.uncached, self.memory)
        told = all(part is None or part.passed for part in parts)
        return every_case and told and not self.loss_failures

    @property
    def metrics(self) -> Metrics | None:
        """Over all cases; None when none could be run."""
        return metrics_over(self.cases)

    @property
    def loss_failures(self) -> tuple[str, ...]:
        """What quantised weights cost beyond their gate."""
        if self.loss is None or self.loss_gate is None:
            return ()
        return self.loss.failures(self.loss_gate)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; a distance that is not finite is null."""
        return finite(
            {
                "schema_version": SCHEMA_VERSION,
                "passed": self.passed,
                "bundle_digest": self.bundle_digest,
                "source_digest": self.source_digest,
                "reference": self.reference.to_dict(),
                "verified": self.verified,
                "target": self.target,
                "dtype": self.dtype,
                "gates": self.gate.to_dict(),
                "cases": [case.to_dict() for case in self.cases],
                "metrics": _told(self.metrics),
                "top1": self.top1.to_dict(),
                "rounding": _told(self.rounding),
                "loss": None if self.loss is None else told_of(self.loss, self.loss_gate),
                "text": _told(self.text),
                "uncached": _told(self.uncached),
                "bisect": _told(self.bisect),
                "memory": _told(self.memory),
                "versions": dict(self.versions),
                "notes": list(self.notes),
                "seconds": round(self.seconds, 3),
                **({} if self.about is None else self.about.to_dict()),
            }
        )


def _told(part: Any) -> Any:
    return None if part is None else part.to_dict()


@dataclass(frozen=True)
class ReferenceName:
    """What the bundle was held against. `kind`: "source", "goldens", "bundle" or "onnx"."""

    kind: str
    digest: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def report_of(
    held: Held,
    cases: tuple[CaseResult, ...],
    *,
    subject: Mapping[str, Any],
    notes: tuple[str, ...],
    **parts: Any,
) -> ValidationReport:
    """The report on a bundle, `subject`, that was held against `held`; `parts` go into it as they
    are."""
    return ValidationReport(
        **subject,
        source_digest=held.source_digest,
        reference=ReferenceName(held.kind, held.digest),
        gate=held.gate,
        cases=cases,
        top1=top_one(cases, held.overall),
        rounding=rounding_loss(cases, held.overall),
        loss=held.loss,
        loss_gate=held.loss_gate,
        notes=(*notes, *_scaled_gates(cases, held.gate)),
        **parts,
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


@dataclass(frozen=True)
class RoundingLoss:
    """What storing in half precision costs against the fp32 source, over all positions.

    A model may be one that half precision costs much: a router's choice hangs on little. What the
    source loses when PyTorch rounds it in the same places is then the measure of what it may cost.
    """

    positions: int
    mean_kl: float
    rel_l2: float  # root mean square over the cases, by positions; reported
    source_mean_kl: float
    wanted_mean_kl: float

    @property
    def passed(self) -> bool:
        return self.mean_kl <= self.wanted_mean_kl

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


# Of the rounded source's own loss: what another order of the same roundings may add.
_OVER_SOURCE = 1.5


def rounding_loss(cases: tuple[CaseResult, ...], gate: Gate) -> RoundingLoss | None:
    """None for fp32, where nothing is rounded."""
    found = [case.rounding for case in cases if case.rounding is not None]
    positions = sum(each.positions for each in found)
    if not positions:
        return None
    own = [case.source_rounding for case in cases if case.source_rounding is not None]
    source_mean_kl = sum(each.positions * each.mean_kl for each in own) / positions
    allowed = _OVER_SOURCE * source_mean_kl if math.isfinite(source_mean_kl) else 0.0
    return RoundingLoss(
        positions=positions,
        mean_kl=sum(each.positions * each.mean_kl for each in found) / positions,
        rel_l2=math.sqrt(sum(each.positions * each.rel_l2**2 for each in found) / positions),
        source_mean_kl=source_mean_kl,
        wanted_mean_kl=max(gate.mean_kl, allowed),
    )


def top_one(cases: tuple[CaseResult, ...], gate: Gate) -> TopOne:
    """Agreement with the fp32 source over every case that could be run.

    Where the source rounded alike changes its own choice more often than the gate allows, that is
    the measure, as for `RoundingLoss`.
    """
    pairs = [case.rounding or case.logits for case in cases]
    found = _agreement([logits for logits in pairs if logits is not None], gate.top1)
    own = [case.source_rounding for case in cases if case.source_rounding is not None]
    if not own:
        return found
    allowed = 1 - _OVER_SOURCE * (1 - _agreement(own, gate.top1).share)
    return replace(found, wanted=min(gate.top1, allowed))


def _agreement(found: Sequence[LogitDifference], wanted: float) -> TopOne:
    return TopOne(
        positions=sum(logits.positions for logits in found),
        flips=sum(logits.flips for logits in found),
        near_ties=sum(logits.near_ties for logits in found),
        wanted=wanted,
    )
