"""Fits the rounding of a layout's weights to a text, and keeps it where that serves a text unseen.

The source runs once over the text, layer by layer. Each matrix is rounded when its inputs come by
(`weight_forms/feedback.py`), and what follows sees what the rounded one gives, so later weights
make up for earlier ones. Experts see the tokens that are routed to them. Then the source itself,
the source rounded to nearest and the source rounded so run over the end of the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mla_deploy.config import MlaConfig
from mla_deploy.export.calibration.targets import Target, Targets
from mla_deploy.export.calibration.text import CalibrationText
from mla_deploy.export.weights import WeightLayout
from mla_deploy.source.layerwise import LayerwiseModel, Prepared
from mla_deploy.weight_forms.feedback import rounded_with_feedback, upper_factor
from mla_deploy.weight_forms.one_thread import one_thread
from mla_deploy.weight_forms.parts import packed
from mla_deploy.weight_forms.rounded import PlanRounding

CALIBRATED, NEAREST = "calibrated", "nearest"
_LEAST_INPUTS = 32  # of an expert that saw fewer tokens, too little is known
_CHUNK = 4096  # inputs whose moments are summed in fp32
_PASSES = 4

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class HeldOut:
    """On the end of the text, of a rounding: against the source, and by itself."""

    mean_kl: float
    perplexity: float


@dataclass(frozen=True)
class Calibration:
    """What was done: `kept` is "calibrated", or "nearest" where the held-out text says so.

    `weights` counts those that were fitted; `unseen` those that are rounded to nearest because too
    few tokens came by.
    """

    kept: str
    tokens: int
    held_out_tokens: int
    weights: int
    unseen: int
    text_sha256: str
    source_perplexity: float
    nearest: HeldOut
    calibrated: HeldOut

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def calibrate(
    config: MlaConfig,
    read: Callable[[str, tuple[int, ...]], torch.Tensor],
    layout: WeightLayout,
    rounding: PlanRounding,
    *,
    text: CalibrationText,
    report: Progress,
) -> Calibration:
    """Fit the weights of `layout`, which gets those that are kept; `rounding` is the nearest one.

    `read` gives whole parameters of the source by name and shape.
    """
    model = LayerwiseModel(config, read)
    walk = _Walk(Targets(layout), rounding)
    passes = iter(range(_PASSES))

    def progress() -> Callable[[int, int], None]:
        number = next(passes)
        return lambda done, total: report("calibrate", number * total + done, _PASSES * total)

    model.walk(text.fitted, walk.before, walk.seen, progress())
    judged = text.held_out

    def log_probabilities(rounding: Prepared) -> torch.Tensor:
        return model.logits(judged, rounding, progress()).log_softmax(-1)

    source = _Judged.of(log_probabilities(lambda _, weight: weight), judged)
    nearest = _Judged.of(log_probabilities(rounding), judged)
    fitted = _Judged.of(log_probabilities(walk.fitted), judged)
    losses = nearest.against(source), fitted.against(source)
    # A model that guesses the text worse than by lot has no perplexity to lose.
    is_known = source.perplexity < config.vocab_size
    is_kept = losses[1].mean_kl <= losses[0].mean_kl and not (
        is_known and fitted.is_worse_than(nearest)
    )
    if is_kept:
        layout.rounded.update(walk.found)
    return Calibration(
        kept=CALIBRATED if is_kept else NEAREST,
        tokens=text.fitted.numel(),
        held_out_tokens=judged.numel(),
        weights=len(walk.found),
        unseen=len(walk.targets) - len(walk.found),
        text_sha256=text.digest,
        source_perplexity=source.perplexity,
        nearest=losses[0],
        calibrated=losses[1],
    )


class _Walk:
    """Rounds matrices as their inputs come by. `found`: their parts, by name in the file."""

    def __init__(self, targets: Targets, rounding: PlanRounding) -> None:
        self.targets = targets
        self.found: dict[str, Mapping[str, torch.Tensor]] = {}
        self._rounding = rounding
        self._recent: list[tuple[torch.Tensor, int, torch.Tensor]] = []

    def before(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """What a weight is until a product shows its inputs: itself; what none will show is rounded
        to nearest at once. One that was shown comes again as it was rounded."""
        keys = {t.key for _, t in self._targets_of(name, weight)}
        if not keys:
            return self._rounding(name, weight)
        return self.fitted(name, weight) if keys & set(self.found) else weight

    def seen(
        self, x_XK: torch.Tensor, name: str, index: int | None, matrix_RK: torch.Tensor
    ) -> None:
        targets = [t for t in self.targets.of(name, index) if t.key not in self.found]
        if not targets:
            return
        # As a stack of one: rows of an expert may be as many as those of a router.
        whole = matrix_RK if index is None else matrix_RK[None]
        nearest_RK = self._rounding(name, whole).view(matrix_RK.shape)
        if len(x_XK) < _LEAST_INPUTS:
            matrix_RK.copy_(nearest_RK)
            return
        upper_KK = self._upper(x_XK)
        fitted_RK = nearest_RK.clone()
        for target in targets:
            part, own = target.part, target.of(matrix_RK)
            rows_RK = own.reshape(-1, own.shape[-1])
            with one_thread():
                fitted = rounded_with_feedback(rows_RK, upper_KK, part.form, part.scale_dtype)
            self.found[target.key] = packed(fitted, part)
            back = target.dequantized(self.found[target.key], own.shape[-1])
            target.of(fitted_RK).copy_(back.view(own.shape))
        matrix_RK.copy_(fitted_RK)

    def fitted(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """`weight` as a bundle that keeps the fitted rounding computes with it."""
        rounded = self._rounding(name, weight).clone()
        for matrix_RK, target in self._targets_of(name, rounded):
            if target.key in self.found:
                own = target.of(matrix_RK)
                back = target.dequantized(self.found[target.key], own.shape[-1])
                own.copy_(back.view(own.shape))
        return rounded

    def _targets_of(self, name: str, weight: torch.Tensor) -> Iterator[tuple[torch.Tensor, Target]]:
        """Each target of a whole parameter, and the matrix it lies in."""
        if weight.dim() == 2:
            yield from ((weight, target) for target in self.targets.of(name, None))
        elif weight.dim() == 3:
            for place, matrix_RK in enumerate(weight):
                yield from ((matrix_RK, target) for target in self.targets.of(name, place))

    def _upper(self, x_XK: torch.Tensor) -> torch.Tensor:
        """Made once for those that read the same inputs: gate and up, the projections that begin
        an attention."""
        for held_XK, version, upper_KK in self._recent:
            if _place(held_XK) == _place(x_XK) and version == x_XK._version:
                return upper_KK
        moments_KK = torch.zeros(x_XK.shape[1], x_XK.shape[1], dtype=torch.float64)
        for part_XK in x_XK.split(_CHUNK):
            moments_KK += part_XK.T @ part_XK
        upper_KK = upper_factor(moments_KK)
        # Held, so that its memory is no other's meanwhile.
        self._recent = [*self._recent[-1:], (x_XK, x_XK._version, upper_KK)]
        return upper_KK


def _place(x_XK: torch.Tensor) -> tuple[Any, ...]:
    return x_XK.data_ptr(), tuple(x_XK.shape), x_XK.stride()


@dataclass(frozen=True)
class _Judged:
    """What one rounding says of the held-out rows: log probabilities, and of each next token."""

    log_BSV: torch.Tensor
    next_X: torch.Tensor

    @classmethod
    def of(cls, log_BSV: torch.Tensor, ids_BS: torch.Tensor) -> _Judged:
        return cls(log_BSV, log_BSV[:, :-1].gather(-1, ids_BS[:, 1:, None]).double().flatten())

    @property
    def perplexity(self) -> float:
        return math.exp(-float(self.next_X.mean()))

    def against(self, source: _Judged) -> HeldOut:
        kl_BS = (source.log_BSV.exp() * (source.log_BSV - self.log_BSV)).sum(-1)
        return HeldOut(max(0.0, float(kl_BS.double().mean())), self.perplexity)

    def is_worse_than(self, other: _Judged) -> bool:
        """Whether perplexity is larger, by more than chance: two standard errors of the difference,
        token by token. A text of some pages tells no less."""
        loss_X = other.next_X - self.next_X
        error = float(loss_X.std()) / math.sqrt(len(loss_X))
        return not float(loss_X.mean()) <= 2.0 * error
