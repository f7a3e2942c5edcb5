"""One table of frequencies for all layers, where a class has no other: which pairs keep turning.

A layer of our own class turns the pairs that lose most without (`key_basis.rotation_scores`). Here
all layers must turn as many pairs of each frequency as the others. The k-th best axis of a
frequency is worth the sum over layers of its score there; these sums fall with k, so the best R/2
of all of them are the best table there is, and each layer fills it with its own best axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mla_deploy.compress.key_basis import Doubles, Integers


def shared_slots(scores_XC: Sequence[Doubles], frequency_C: Integers, pairs: int) -> Integers:
    """[F]: how many pairs of each frequency turn, `pairs` in all. `scores_XC`: layer by layer."""
    frequencies = int(frequency_C.max()) + 1
    ranked = [
        sum(np.sort(scores_C[frequency_C == index])[::-1] for scores_C in scores_XC)
        for index in range(frequencies)
    ]
    worth = np.array(ranked)  # [F, axes]
    best = np.argsort(-worth, axis=None, kind="stable")[:pairs]
    return np.bincount(best // worth.shape[1], minlength=frequencies)


def best_pairs(scores_C: Doubles, frequency_C: Integers, slots_F: Integers) -> Integers:
    """The pairs of one layer that turn: the best of each frequency, frequency by frequency."""
    chosen = []
    for index, count in enumerate(slots_F):
        members = np.flatnonzero(frequency_C == index)
        best = members[np.argsort(-scores_C[members], kind="stable")[:count]]
        chosen.append(np.sort(best))
    return np.concatenate(chosen)
