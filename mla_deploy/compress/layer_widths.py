"""Widths that differ between layers, at the same total: more where a layer loses more by a cut.

Each layer's loss is measured, not read off a spectrum: a few rows go through the source with that
one layer cut, once to the width that all would have and once to less. Through both a line,

    log KL_l = a_l - b_l w_l

and sum KL_l at a fixed sum of w_l is least where b_l exp(a_l - b_l w_l) is the same everywhere.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mla_deploy.compress.key_basis import Doubles
from mla_deploy.compress.latent_layers import LatentLayers
from mla_deploy.compress.loss import token_kls
from mla_deploy.compress.stream import LayerMoments, Rows

LESS = 0.75  # of the widths, in the second of both cuts
_EVERY = 3  # tokens of a probe: logits cost more than layers do
_STEPS = 32  # of the usual width, that is dealt out in as many parts
# Of the usual width: no layer is cut to less or given more than a line through two points tells.
_LEAST, _MOST = 0.5, 1.5


class Probes:
    """Rows that went through the source but for one layer each, cut to one of two widths."""

    def __init__(self, cuts: Sequence[LatentLayers], rows: Rows) -> None:
        """`cuts`: the whole model at each of the widths; `rows` are embedded."""
        self._cuts, self._rows = cuts, rows
        self._probes: list[list[Rows]] = [[] for _ in cuts]

    def through(self, index: int, layer: Any, weights: Any, moments: LayerMoments) -> None:
        """All of them pass `layer`, and new ones pass it cut."""
        for probes in self._probes:
            for each in probes:
                each.through(layer)
        for cut, probes in zip(self._cuts, self._probes, strict=True):
            made = cut.made(index, layer, cut.folding(index, weights, moments), weights)
            probe = self._rows.copied(len(self._rows.tokens_XS))
            probe.through(made)
            cut.release(made)
            probes.append(probe)
        self._rows.through(layer)

    def losses(self, norm: nn.Module, head: torch.Tensor) -> Doubles:
        """[widths, layers]: mean KL of each."""
        return np.array(
            [
                [
                    float(token_kls(self._rows, each, norm, head, every=_EVERY).mean())
                    for each in probes
                ]
                for probes in self._probes
            ]
        )


@dataclass(frozen=True)
class _Line:
    """log KL against width."""

    at: float
    slope: float  # above zero: what a value more takes off

    def gain(self, width: float, step: float) -> float:
        """What `step` values more than `width` save."""
        return float(np.exp(self.at - self.slope * width) * -np.expm1(-self.slope * step))


def spread(usual: int, losses: Doubles, whole: int) -> list[int]:
    """Widths of layers, whose mean is `usual` at most. `losses`: [2, layers], at `usual` and at
    `LESS` of it; `whole` is the widest that there is."""
    floor = np.finfo(np.float32).tiny
    high, low = np.log(np.maximum(losses, floor))
    fall = (1.0 - LESS) * usual
    slopes = np.maximum(low - high, 0.01) / fall
    lines = [_Line(at + slope * usual, slope) for at, slope in zip(high, slopes, strict=True)]
    step = max(2, usual // _STEPS)
    least = int(_LEAST * usual)
    most = min(whole, int(_MOST * usual))
    widths = [least] * len(lines)
    left = usual * len(lines) - sum(widths)
    heap = [(-line.gain(least, step), index) for index, line in enumerate(lines)]
    heapq.heapify(heap)
    while heap and left >= step:
        _, index = heapq.heappop(heap)
        if widths[index] + step > most:
            continue
        widths[index] += step
        left -= step
        heapq.heappush(heap, (-lines[index].gain(widths[index], step), index))
    return widths
