"""Channel scales that serve a text: chosen a group at a time by what its products then lose.

    s = rms(x)^a / rms(w)^b      of each channel, normalised; a and b from a small grid

The loss of a choice is that of every product of the group, weight and inputs rounded as the graphs
round them, against the product in float. (1, 1, ...) is among the choices.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from mla_deploy.export.calibration.rounded_inputs import rounded_inputs
from mla_deploy.source.channel_groups import HEADS, NORM, ChannelGroup
from mla_deploy.source.layerwise import LayerwiseModel
from mla_deploy.weight_forms.channel_scales import ChannelScales, of_heads
from mla_deploy.weight_forms.form import WeightForm
from mla_deploy.weight_forms.one_thread import one_thread
from mla_deploy.weight_forms.roles import role_of
from mla_deploy.weight_forms.rounded import PlanRounding
from mla_deploy.weight_forms.rounding import dequantized, quantized

_OF_INPUTS = (0.0, 0.15, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85)
_OF_WEIGHTS = (0.0, 0.2, 0.4, 0.6)
_MOST_INPUTS, _MOST_ROWS, _MOST_EXPERTS = 512, 512, 4
_LEAST_INPUTS = 32
_WIDEST = 256.0  # of a scale, up or down: an fp16 weight then stays far from its ends


@dataclass(frozen=True)
class Choice:
    """Of one group: its exponents, and what its products lose without scales and with them."""

    exponents: tuple[float, float]
    before: float
    after: float


@dataclass
class _Seen:
    """Of a group whose layer runs."""

    x_XK: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    inputs: int = 0  # of which `x_XK` is some
    matrices: list[tuple[torch.Tensor, WeightForm]] = field(default_factory=list)
    experts: int = 0


class ScaleSearch:
    """`seen` of a walk over the source, and `layer_done` of its progress; `found` at its end."""

    def __init__(
        self, model: LayerwiseModel, groups: tuple[ChannelGroup, ...], rounding: PlanRounding
    ) -> None:
        self._shapes = model.shapes
        self._rounding = rounding
        self._by_reader = {
            reader: group for group in groups if _is_served(group) for reader in group.readers
        }
        self._pending: dict[ChannelGroup, _Seen] = {}
        self._scales: dict[ChannelGroup, torch.Tensor] = {}
        self.choices: dict[ChannelGroup, Choice] = {}

    def seen(
        self, x_XK: torch.Tensor, name: str, index: int | None, matrix_RK: torch.Tensor
    ) -> None:
        group = self._by_reader.get(name)
        if group is None:
            return
        form = self._rounding.form(name, self._shapes[name])
        held = self._pending.setdefault(group, _Seen())
        if len(x_XK) > held.inputs:
            held.x_XK, held.inputs = _spread(x_XK, _MOST_INPUTS).clone(), len(x_XK)
        held.experts += index is not None
        if form is not None and held.experts <= _MOST_EXPERTS:
            held.matrices.append((_spread(matrix_RK, _MOST_ROWS).clone(), form))

    def layer_done(self) -> None:
        """Choose for the groups that were seen whole, for their layer loses its weights now."""
        for group, held in self._pending.items():
            if held.inputs < _LEAST_INPUTS or not held.matrices:
                continue
            with one_thread():
                scale_K, self.choices[group] = self._chosen(held.x_XK, held.matrices)
            if scale_K is not None:
                self._scales[group] = scale_K
        self._pending = {}

    def found(self, without: str | None = None) -> ChannelScales:
        """Those of every group that has others than ones, but for groups of a kind."""
        self.layer_done()
        scales = {g: scale_K for g, scale_K in self._scales.items() if g.kind != without}
        return ChannelScales(
            {
                g.maker: of_heads(scale_K, g.heads, g.nope) if g.kind == HEADS else scale_K
                for g, scale_K in scales.items()
            },
            {reader: g.maker for g in scales for reader in g.readers},
        )

    def _chosen(
        self, x_XK: torch.Tensor, matrices: list[tuple[torch.Tensor, WeightForm]]
    ) -> tuple[torch.Tensor | None, Choice]:
        of_x_K = _magnitude(x_XK)
        of_w_K = torch.stack([_magnitude(w) / w.square().mean().sqrt() for w, _ in matrices])
        of_w_K = of_w_K.square().mean(0).sqrt()
        wanted = [x_XK @ w_RK.T for w_RK, _ in matrices]
        before = self._loss(x_XK, matrices, wanted, torch.ones_like(of_x_K))
        best, least, exponents = None, before, (0.0, 0.0)
        for a in _OF_INPUTS:
            for b in _OF_WEIGHTS:
                scale_K = of_x_K**a / of_w_K**b
                scale_K /= scale_K.log().mean().exp()
                scale_K = scale_K.clamp_(1 / _WIDEST, _WIDEST)
                loss = self._loss(x_XK, matrices, wanted, scale_K)
                if loss < least:
                    best, least, exponents = scale_K, loss, (a, b)
        return best, Choice(exponents, before, least)

    def _loss(
        self,
        x_XK: torch.Tensor,
        matrices: list[tuple[torch.Tensor, WeightForm]],
        wanted: list[torch.Tensor],
        scale_K: torch.Tensor,
    ) -> float:
        """Squared errors of the products, each as a share of its own squares."""
        divided_XK, lost = x_XK / scale_K, 0.0
        for (w_RK, form), wanted_XR in zip(matrices, wanted, strict=True):
            weight = dequantized(quantized(w_RK * scale_K, form, self._rounding.scale_dtype), form)
            given = divided_XK if self._rounding.for_device else rounded_inputs(divided_XK, form)
            error = (given @ weight.T - wanted_XR).square().sum()
            lost += float(error / wanted_XR.square().sum().clamp(min=1e-30))
        return lost


def _is_served(group: ChannelGroup) -> bool:
    """A norm of 1 + w is left alone, and a latent: its channels are what the cache holds."""
    is_plain = group.kind != NORM or group.neutral == 1.0
    return is_plain and not any(role_of(r) == "kv_b" for r in group.readers)


def _magnitude(x_XK: torch.Tensor) -> torch.Tensor:
    """Root mean square of each channel; one of zeros counts as the least of the others."""
    squares_K = x_XK.double().square().mean(0)
    used_K = squares_K[squares_K > 0]
    least = float(used_K.min()) if len(used_K) else 1.0
    return squares_K.clamp(min=least).sqrt().float()


def _spread(x_XK: torch.Tensor, most: int) -> torch.Tensor:
    """At most so many rows, from all over."""
    if len(x_XK) <= most:
        return x_XK
    return x_XK[torch.linspace(0, len(x_XK) - 1, most).round().long()]
