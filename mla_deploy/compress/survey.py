"""A first pass over the layers, where all of them must be known before one is written.

Their statistics are kept for the second pass while they are small; else it takes them again.
"""

from __future__ import annotations

from dataclasses import dataclass

from mla_deploy.compress.budget import Progress
from mla_deploy.compress.key_basis import Integers
from mla_deploy.compress.plan import Settings, turning_scores
from mla_deploy.compress.proof import Proof
from mla_deploy.compress.shared_table import shared_slots
from mla_deploy.compress.stream import LayerMoments, MomentsOf, Rows
from mla_deploy.compress.text import Rations

_MOST_KEPT_BYTES = 1 << 30


@dataclass(frozen=True)
class Survey:
    """`slots_F`: pairs of each frequency that turn in every layer; None: nothing to choose.
    `moments`: of all layers, or none."""

    slots_F: Integers | None = None
    moments: tuple[LayerMoments, ...] = ()


def survey(proof: Proof, settings: Settings, given: Rations, progress: Progress | None) -> Survey:
    """Run the calibration rows through the source. Raises: as `Proof`; InputError CMP-NONFINITE."""
    source = proof.source
    facts = source.facts
    rows = Rows(given.calibration, source.rotary)
    rows.embed(source.trunk()[0])
    frequencies_F, _ = source.frequencies(settings.context)
    width = 2 * facts.groups * facts.head_dim
    keeps = facts.layers * width**2 * 8 <= _MOST_KEPT_BYTES
    kept: list[LayerMoments] = []
    scores = []
    for index in range(facts.layers):
        if progress is not None:
            progress("statistics", index, facts.layers)
        layer = source.layer(index)
        proof.layer(layer, index)
        collected = MomentsOf(source.attention(layer), index)
        rows.through(layer, collected)
        moments = collected.done()
        basis, _, scores_C = turning_scores(settings, moments, facts.groups, frequencies_F)
        scores.append(scores_C)
        if keeps:
            kept.append(moments)
    if progress is not None:
        progress("statistics", facts.layers, facts.layers)
    return Survey(shared_slots(scores, basis.frequency_C, settings.rope // 2), tuple(kept))
