"""A first pass over the layers, where all of them must be known before one is written.

Their statistics are kept for the second pass while they are small; else it takes them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mla_deploy.compress.heads_model import HeadsModel
from mla_deploy.compress.key_basis import Integers
from mla_deploy.compress.plan import Settings, turning_scores
from mla_deploy.compress.shared_table import shared_slots
from mla_deploy.compress.stream import LayerMoments, MomentsOf, Rows

_MOST_KEPT_BYTES = 1 << 30


@dataclass(frozen=True)
class Survey:
    """`slots_F`: pairs of each frequency that turn in every layer. `moments`: of all layers."""

    slots_F: Integers
    moments: Sequence[LayerMoments] | None


def survey(
    source: HeadsModel,
    rows: Rows,
    settings: Settings,
    told: Callable[[int], None],
) -> Survey:
    """Run the calibration `rows`, embedded, through the source. `told` hears of each layer."""
    facts = source.facts
    width = 2 * facts.groups * facts.head_dim
    keeps = facts.layers * width**2 * 8 <= _MOST_KEPT_BYTES
    kept: list[LayerMoments] = []
    scores = []
    frequencies_F = source.rope.inv_freq_F.double().numpy()
    for index in range(facts.layers):
        told(index)
        layer = source.layer(index)
        collected = MomentsOf(source.attention(layer), index)
        rows.through(layer, collected)
        moments = collected.done()
        basis, _, scores_C = turning_scores(settings, moments, facts.groups, frequencies_F)
        scores.append(scores_C)
        if keeps:
            kept.append(moments)
    told(facts.layers)
    slots_F = shared_slots(scores, basis.frequency_C, settings.rope // 2)
    return Survey(slots_F, kept if keeps else None)
