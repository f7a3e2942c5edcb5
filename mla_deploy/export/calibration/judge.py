"""Which rounding serves a text that it was not fitted to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mla_deploy.errors import GateError
from mla_deploy.export.calibration.rounded_inputs import RoundedInputs
from mla_deploy.source.layerwise import LayerwiseModel, Prepared, Progress
from mla_deploy.weight_forms.rounded import PlanRounding


@dataclass(frozen=True)
class HeldOut:
    """On the end of the text, of a rounding: against the source, and by itself."""

    mean_kl: float
    perplexity: float


@dataclass(frozen=True)
class Judged:
    """What one rounding says of the held-out rows: how far it is from the source, and the log
    probability of each next token."""

    mean_kl: float
    next_X: torch.Tensor

    @property
    def held_out(self) -> HeldOut:
        return HeldOut(self.mean_kl, self.perplexity)

    @property
    def perplexity(self) -> float:
        return math.exp(-float(self.next_X.mean()))

    def is_worse_than(self, other: Judged) -> bool:
        """Whether perplexity is larger, by more than chance: two standard errors of the difference,
        token by token. A text of some pages tells no less."""
        loss_X = other.next_X - self.next_X
        error = float(loss_X.std()) / math.sqrt(len(loss_X))
        return not float(loss_X.mean()) <= 2.0 * error


class Judge:
    """Holds roundings of `model` against itself, over `ids_BS`; `progress` is asked for once a
    run.

    Raises, as `of` does: GateError RUN-NONFINITE.
    """

    def __init__(
        self,
        model: LayerwiseModel,
        rounding: PlanRounding,
        ids_BS: torch.Tensor,
        progress: Callable[[], Progress],
    ) -> None:
        self._model = model
        self._rounding = rounding
        self._ids_BS = ids_BS
        self._progress = progress
        self._wanted_BSV = self._log_probabilities(lambda _, weight: weight)
        self.source = Judged(0.0, self._next(self._wanted_BSV))

    def of(self, prepared: Prepared) -> Judged:
        """Weights as `prepared` makes them, inputs of products rounded as the graphs do."""
        with RoundedInputs(self._model, self._rounding):
            log_BSV = self._log_probabilities(prepared)
        kl_BS = (self._wanted_BSV.exp() * (self._wanted_BSV - log_BSV)).sum(-1)
        return Judged(max(0.0, float(kl_BS.double().mean())), self._next(log_BSV))

    def is_better(self, found: Judged, other: Judged) -> bool:
        """Nearer to the source, and of no larger perplexity."""
        # A model that guesses the text worse than by lot has no perplexity to lose.
        is_known = self.source.perplexity < self._wanted_BSV.shape[-1]
        return found.mean_kl <= other.mean_kl and not (is_known and found.is_worse_than(other))

    def _log_probabilities(self, prepared: Prepared) -> torch.Tensor:
        logits_BSV = self._model.logits(self._ids_BS, prepared, self._progress())
        if not torch.isfinite(logits_BSV).all():
            raise GateError(
                "RUN-NONFINITE",
                "the model's logits on the text to calibrate with hold NaN or infinity",
                hint="nothing can be fitted to them: leave --calibrate out, and see whether the "
                "checkpoint is whole",
            )
        return logits_BSV.log_softmax(-1)

    def _next(self, log_BSV: torch.Tensor) -> torch.Tensor:
        return log_BSV[:, :-1].gather(-1, self._ids_BS[:, 1:, None]).double().flatten()
