"""Fits the rounding of a layout's weights to a text, and keeps it where that serves a text unseen.

The source runs once over the text, layer by layer, for channel scales (`scales.py`). Then it runs
once more, and each matrix is rounded when its inputs come by (`weight_forms/feedback.py`); what
follows sees what the rounded one gives, so later weights make up for earlier ones. Experts see the
tokens that are routed to them. Then the source itself and each rounding of it run over the end of
the text, inputs rounded as the graphs round them, and the best is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mla_deploy.config import MlaConfig
from mla_deploy.export.calibration.judge import HeldOut, Judge
from mla_deploy.export.calibration.scales import ScaleReport, found_scales
from mla_deploy.export.calibration.targets import Target, Targets
from mla_deploy.export.calibration.text import CalibrationText
from mla_deploy.export.weights import WeightLayout
from mla_deploy.source.layerwise import LayerwiseModel
from mla_deploy.weight_forms.channel_scales import ChannelScales
from mla_deploy.weight_forms.feedback import Feedback, rounded_with_feedback
from mla_deploy.weight_forms.one_thread import one_thread
from mla_deploy.weight_forms.parts import packed
from mla_deploy.weight_forms.rounded import PlanRounding

CALIBRATED, SCALED, NEAREST = "calibrated", "scaled", "nearest"
_LEAST_INPUTS = 32  # of an expert that saw fewer tokens, too little is known
_CHUNK = 4096  # inputs whose moments are summed in fp32
_PASSES = 6

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Calibration:
    """What was done. `kept`: "calibrated" (fitted), "scaled" (to nearest, with channel scales) or
    "nearest", by what the held-out text says.

    `weights` counts those that were fitted; `unseen` those that are rounded to nearest because too
    few tokens came by. `scaled`: None where no scale serves; what is fitted has them if `scaled`
    is better than `nearest`.
    """

    kept: str
    tokens: int
    held_out_tokens: int
    weights: int
    unseen: int
    text_sha256: str
    source_perplexity: float
    nearest: HeldOut
    scaled: HeldOut | None
    scales: ScaleReport | None
    calibrated: HeldOut

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


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
    passes = iter(range(_PASSES))

    def progress() -> Callable[[int, int], None]:
        number = next(passes)
        return lambda done, total: report("calibrate", number * total + done, _PASSES * total)

    judge = Judge(model, rounding, text.held_out, progress)
    nearest = judge.of(rounding)
    scales, told = found_scales(model, rounding, text.fitted, progress())
    scaled = judge.of(lambda name, weight: rounding(name, scales(name, weight)))
    is_scaled = bool(scales) and judge.is_better(scaled, nearest)
    best = scaled if is_scaled else nearest
    walk = _Walk(Targets(layout), rounding, scales if is_scaled else ChannelScales())
    model.walk(text.fitted, walk.before, walk.seen, progress())
    fitted = judge.of(walk.fitted)
    kept = SCALED if is_scaled else NEAREST
    if judge.is_better(fitted, best):
        kept = CALIBRATED
        layout.rounded.update(walk.found)
    if is_scaled:
        layout.scales = scales
    return Calibration(
        kept=kept,
        tokens=text.fitted.numel(),
        held_out_tokens=text.held_out.numel(),
        weights=len(walk.found),
        unseen=len(walk.targets) - len(walk.found),
        text_sha256=text.digest,
        source_perplexity=judge.source.perplexity,
        nearest=nearest.held_out,
        scaled=scaled.held_out if scales else None,
        scales=told,
        calibrated=fitted.held_out,
    )


class _Walk:
    """Rounds matrices as their inputs come by. `found`: their parts, by name in the file."""

    def __init__(self, targets: Targets, rounding: PlanRounding, scales: ChannelScales) -> None:
        self.targets = targets
        self.found: dict[str, Mapping[str, torch.Tensor]] = {}
        self._rounding = rounding
        self._scales = scales
        self._recent: list[tuple[torch.Tensor, int, _Moments]] = []

    def before(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """What a weight is until a product shows its inputs: itself; what none will show is rounded
        to nearest at once. One that was shown comes again as it was rounded."""
        keys = {t.key for _, t in self._targets_of(name, weight)}
        if keys & set(self.found):
            return self.fitted(name, weight)
        folded = self._scales(name, weight)
        return folded if keys else self._rounding(name, folded)

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
        moments = self._moments(x_XK)
        fitted_RK = nearest_RK.clone()
        for target in targets:
            part, own = target.part, target.of(matrix_RK)
            rows_RK = own.reshape(-1, own.shape[-1])
            with one_thread():
                feedback = moments.feedback(part.form.width(rows_RK.shape[1]))
                fitted = rounded_with_feedback(rows_RK, feedback, part.form, part.scale_dtype)
            self.found[target.key] = packed(fitted, part)
            back = target.dequantized(self.found[target.key], own.shape[-1])
            target.of(fitted_RK).copy_(back.view(own.shape))
        matrix_RK.copy_(fitted_RK)

    def fitted(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """`weight` as a bundle that keeps the fitted rounding computes with it."""
        rounded = self._rounding(name, self._scales(name, weight)).clone()
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

    def _moments(self, x_XK: torch.Tensor) -> _Moments:
        """Made once for those that read the same inputs: gate and up, the projections that begin
        an attention."""
        for held_XK, version, moments in self._recent:
            if _place(held_XK) == _place(x_XK) and version == x_XK._version:
                return moments
        # Held, so that its memory is no other's meanwhile.
        self._recent = [*self._recent[-1:], (x_XK, x_XK._version, _Moments(x_XK))]
        return self._recent[-1][2]


class _Moments:
    """Of the inputs of a product, and what follows for blocks of a width."""

    def __init__(self, x_XK: torch.Tensor) -> None:
        columns = x_XK.shape[1]
        self._moments_KK = torch.zeros(columns, columns, dtype=torch.float64)
        for part_XK in _evened(x_XK).split(_CHUNK):
            self._moments_KK += part_XK.T @ part_XK
        self._known: dict[int, Feedback] = {}

    def feedback(self, width: int) -> Feedback:
        if width not in self._known:
            self._known[width] = Feedback.of(self._moments_KK, width)
        return self._known[width]


def _evened(x_XK: torch.Tensor) -> torch.Tensor:
    """No input longer than the median one: a few tokens of massive activations would stand for the
    whole text, while what their products lose is little in a residual stream that is as large."""
    lengths_X = x_XK.norm(dim=1)
    used_X = lengths_X[lengths_X > 0]
    if not len(used_X):
        return x_XK
    return x_XK * (used_X.median() / lengths_X.clamp(min=used_X.min())).clamp(max=1.0)[:, None]


def _place(x_XK: torch.Tensor) -> tuple[Any, ...]:
    return x_XK.data_ptr(), tuple(x_XK.shape), x_XK.stride()
