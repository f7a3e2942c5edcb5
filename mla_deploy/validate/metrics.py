"""The distances of a whole report in seven numbers, over every case that could be run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mla_deploy.validate.difference import p999
from mla_deploy.validate.parity import CaseResult


@dataclass(frozen=True)
class Metrics:
    """Against what the cases are held against; `top1` leaves near ties out."""

    max_abs: float
    rel_l2: float  # of all logits together
    mean_kl: float  # nats, over all positions
    p999_kl: float
    top1: float
    near_ties: int
    positions: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def metrics_over(cases: Sequence[CaseResult]) -> Metrics | None:
    """None when no case could be run."""
    found = [case.logits for case in cases if case.logits is not None]
    if not found:
        return None
    kl_X = [kl for logits in found for kl in logits.kl_X]
    ties = sum(logits.near_ties for logits in found)
    judged = len(kl_X) - ties
    return Metrics(
        max_abs=max(logits.max_abs for logits in found),
        rel_l2=_together([(logits.rel_l2, logits.size) for logits in found]),
        mean_kl=sum(kl_X) / len(kl_X),
        p999_kl=p999(kl_X),
        top1=1.0 if judged <= 0 else 1 - sum(logits.flips for logits in found) / judged,
        near_ties=ties,
        positions=len(kl_X),
    )


def _together(parts: Sequence[tuple[float, float]]) -> float:
    """One relative error of several, each with the size of its reference."""
    if not all(math.isfinite(error) for error, _ in parts):
        return math.inf
    size = math.hypot(*(size for _, size in parts))
    return 0.0 if size == 0.0 else math.hypot(*(error * size for error, size in parts)) / size
