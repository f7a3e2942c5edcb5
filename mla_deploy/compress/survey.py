"""A first pass over the layers, where all of them must be known before one is written.

Their statistics are kept for the second pass while they are small; else it takes them again.
"""

from __future__ import annotations

from dataclasses import dataclass

from mla_deploy.compress.key_basis import Integers
from mla_deploy.compress.plan import Settings, turning_scores
from mla_deploy.compress.proof import Proof
from mla_deploy.compress.shared_table import shared_slots
from mla_deploy.compress.statistics import Progress, layer_statistics
from mla_deploy.compress.stream import LayerMoments
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
    frequencies_F, _ = source.frequencies(settings.context)
    width = 2 * facts.groups * facts.head_dim
    keeps = facts.layers * width**2 * 8 <= _MOST_KEPT_BYTES
    kept: list[LayerMoments] = []
    scores = []
    for seen in layer_statistics(proof, given, source.trunk()[0], progress):
        basis, _, scores_C = turning_scores(settings, seen.moments, facts.groups, frequencies_F)
        scores.append(scores_C)
        if keeps:
            kept.append(seen.moments)
    return Survey(shared_slots(scores, basis.frequency_C, settings.rope // 2), tuple(kept))
