"""One table for all layers: the best of all tables, and every layer fills it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mla_deploy.compress.shared_table import best_pairs, shared_slots

FREQUENCIES, AXES = 3, 2
FREQUENCY_C = np.tile(np.arange(FREQUENCIES), AXES)


def kept(scores_XC: list[np.ndarray], slots_F: np.ndarray) -> float:
    """The score that turns, over all layers."""
    return sum(scores_C[best_pairs(scores_C, FREQUENCY_C, slots_F)].sum() for scores_C in scores_XC)


@pytest.mark.parametrize("pairs", range(1, FREQUENCIES * AXES + 1))
@pytest.mark.parametrize("seed", range(5))
def test_no_table_keeps_more(pairs: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores_XC = [rng.exponential(size=FREQUENCIES * AXES) for _ in range(4)]
    found = shared_slots(scores_XC, FREQUENCY_C, pairs)
    assert found.sum() == pairs and len(found) == FREQUENCIES
    every = [
        kept(scores_XC, np.array(slots))
        for slots in itertools.product(range(AXES + 1), repeat=FREQUENCIES)
        if sum(slots) == pairs
    ]
    assert kept(scores_XC, found) == pytest.approx(max(every))


def test_layers_turn_the_same_frequencies_with_pairs_of_their_own() -> None:
    one, other = np.array([1.0, 5, 2, 4, 3, 9]), np.array([9.0, 1, 2, 4, 7, 3])
    slots_F = np.array([1, 2, 1])
    turned = [best_pairs(scores_C, FREQUENCY_C, slots_F) for scores_C in (one, other)]
    assert turned[0].tolist() == [3, 1, 4, 5] and turned[1].tolist() == [0, 1, 4, 5]
    assert all(FREQUENCY_C[pairs].tolist() == [0, 1, 1, 2] for pairs in turned)
