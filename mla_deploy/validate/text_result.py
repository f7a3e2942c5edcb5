"""What a bundle loses on a text that the user named, beside the gates for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mla_deploy.validate.gates import TEXT_GATES, LossGate, loss_gate_for
from mla_deploy.validate.loss import Loss
from mla_deploy.weight_forms.form import WeightPlan


@dataclass(frozen=True)
class TextResult:
    """`loss` on the text `name`."""

    name: str
    loss: Loss
    gate: LossGate

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def failures(self) -> tuple[str, ...]:
        """Which gates are not met."""
        return self.loss.failures(self.gate)

    def to_dict(self) -> dict[str, Any]:
        """`tokens` is how many were judged; `wanted` holds the gates by name."""
        loss = self.loss
        reference, ratio = loss.perplexity, loss.perplexity_ratio
        found = None if reference is None or ratio is None else reference * ratio
        return {
            "name": self.name,
            "tokens": loss.positions,
            "perplexity_reference": reference,
            "perplexity_bundle": found,
            "ratio": ratio,
            "mean_kl": loss.mean_kl,
            "p999_kl": loss.p999_kl,
            "top1": loss.top1,
            "passed": self.passed,
            "wanted": self.gate.to_dict(),
        }


def text_gate(dtype: str, cache_dtype: str, plan: WeightPlan | None) -> LossGate:
    """That of quantised weights, else the looser of weights and cache."""
    if plan is not None:
        return loss_gate_for(plan.kind, cache_dtype) or LossGate()
    one, other = TEXT_GATES[dtype], TEXT_GATES[cache_dtype]
    return LossGate(
        _looser(one.mean_kl, other.mean_kl),
        None,
        _looser(one.perplexity_ratio, other.perplexity_ratio),
    )


def _looser(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else max(one, other)
