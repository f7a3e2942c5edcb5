"""Weights with the scales of channels folded in, made as they are read, and the scales beside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mla_deploy.export.weights import Shaped, StoredWeight, WeightLayout, WeightSource
from mla_deploy.rewrite.weights import WeightUse
from mla_deploy.weight_forms.channel_scales import SCALE, ChannelScales

if TYPE_CHECKING:
    import torch


class ScaledSource:
    """`source` as a model that computes the same; `scales` are read under names of their own."""

    def __init__(self, source: WeightSource, scales: ChannelScales) -> None:
        self._source = source
        self._scales = scales
        self._own = {f"{maker}{SCALE}": scale for maker, scale in scales.scales.items()}
        self.slices: Mapping[str, Shaped] = {**source.slices, **self._own}

    def read(self, name: str, /) -> torch.Tensor:
        """A weight. Raises: as `source.read`."""
        own = self._own.get(name)
        return self._scales(name, self._source.read(name)) if own is None else own

    def read_rows(self, name: str, start: int, stop: int, /) -> torch.Tensor:
        """Rows of a weight. Raises: as `source.read_rows`."""
        rows = self._source.read_rows(name, start, stop)
        return self._scales.rows(name, rows, start, stop)

    def stacked_parts(self, name: str, /) -> tuple[str, ...]:
        return self._source.stacked_parts(name)


def scaled_source(source: WeightSource, layout: WeightLayout) -> WeightSource:
    """`source` with the scales of `layout`, which then stores them: what a bundle is held against
    has to know them."""
    for maker, scale_K in layout.scales.scales.items():
        name = f"{maker}{SCALE}"
        layout.add(StoredWeight(name, WeightUse(name), tuple(scale_K.shape), "fp32"))
    return ScaledSource(source, layout.scales) if layout.scales else source
