"""Channel scales for a text, and the proof that they change nothing but the rounding."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mla_deploy.export.calibration.scale_search import Choice, ScaleSearch
from mla_deploy.source.channel_groups import HEADS, ChannelGroup, channel_groups
from mla_deploy.source.layerwise import LayerwiseModel, Prepared, Progress
from mla_deploy.weight_forms.channel_scales import ChannelScales
from mla_deploy.weight_forms.rounded import PlanRounding

_ROWS, _TOKENS = 2, 64  # that the proof runs over
# Of a token's logits: what fp32 rounds is far less (6e-6 in 30 layers), a wrong scale far more.
_EXACT = 1e-4


@dataclass(frozen=True)
class ScaleReport:
    """What was found. `exponents`: means over groups, of inputs and of weights; `lost_before` and
    `lost_after`: means of what their products lose. `moved`: how far the source's logits go with
    the scales folded in, as a share of them; beyond `_EXACT` no scale is kept."""

    groups: int
    exponents: tuple[float, float]
    lost_before: float
    lost_after: float
    moved: float


def found_scales(
    model: LayerwiseModel, rounding: PlanRounding, ids_BS: torch.Tensor, progress: Progress
) -> tuple[ChannelScales, ScaleReport | None]:
    """Those of the groups that are known whole, if any serves; none if the logits change."""
    few_BS = ids_BS[:_ROWS, :_TOKENS]
    groups = channel_groups(model, few_BS)
    search = ScaleSearch(model, groups, rounding)

    def layer_done(done: int, total: int) -> None:
        search.layer_done()
        progress(done, total)

    model.walk(ids_BS, _as_it_is, search.seen, layer_done)
    scales = search.found()
    if not scales:
        return scales, None
    moved = _moved(model, scales, few_BS)
    if not moved <= _EXACT:  # something lies between the heads and o_proj
        scales = search.found(without=HEADS)
        moved = _moved(model, scales, few_BS)
    report = _report(search.choices, set(scales.scales), moved)
    return (scales if moved <= _EXACT else ChannelScales()), report


def _as_it_is(_: str, weight: torch.Tensor) -> torch.Tensor:
    return weight


def _moved(model: LayerwiseModel, prepared: Prepared, ids_BS: torch.Tensor) -> float:
    """Of the middle token: of two experts with the same score to the last bit, one may be chosen
    here and the other there, and that token then goes another way."""
    wanted_BSV = model.logits(ids_BS, _as_it_is)
    moved_BS = (model.logits(ids_BS, prepared) - wanted_BSV).norm(dim=-1)
    moved = float((moved_BS / wanted_BSV.norm(dim=-1)).median())
    return moved if math.isfinite(moved) else 1.0


def _report(choices: dict[ChannelGroup, Choice], makers: set[str], moved: float) -> ScaleReport:
    scaled = [choice for group, choice in choices.items() if group.maker in makers]

    def mean(values: Iterable[float]) -> float:
        return sum(values) / max(1, len(scaled))

    return ScaleReport(
        groups=len(scaled),
        exponents=(
            mean(choice.exponents[0] for choice in scaled),
            mean(choice.exponents[1] for choice in scaled),
        ),
        lost_before=mean(choice.before for choice in scaled),
        lost_after=mean(choice.after for choice in scaled),
        moved=moved,
    )
