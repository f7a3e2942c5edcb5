"""The first pass over a source: what each layer's keys, values and queries are on the text.

Two things must know all layers before one is written: a budget, which chooses among forms, and a
layout with one table of frequencies for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from mla_deploy.compress.fold import HeadWeights
from mla_deploy.compress.proof import Proof
from mla_deploy.compress.stream import LayerMoments, MomentsOf, Rows
from mla_deploy.compress.text import Rations

Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class SeenLayer:
    """A layer of the source that the calibration rows went through."""

    layer: Any
    weights: HeadWeights
    moments: LayerMoments


def layer_statistics(
    proof: Proof, given: Rations, embed: nn.Module, progress: Progress | None
) -> Iterator[SeenLayer]:
    """Layer by layer. Raises: as `Proof.layer`; InputError CMP-NONFINITE."""
    source = proof.source
    rows = Rows(given.calibration, source.rotary)
    rows.embed(embed)
    count = source.facts.layers
    for index in range(count):
        tell(progress, "statistics", index, count)
        layer = source.layer(index)
        proof.layer(layer, index)
        weights = source.attention(layer)
        collected = MomentsOf(weights, index)
        rows.through(layer, collected)
        yield SeenLayer(layer, weights, collected.done())
    tell(progress, "statistics", count, count)


def tell(progress: Progress | None, stage: str, done: int, total: int) -> None:
    """Report, where somebody listens."""
    if progress is not None:
        progress(stage, done, total)
