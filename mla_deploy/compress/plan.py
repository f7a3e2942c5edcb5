"""Which form a layer takes: exact, the low-rank one found best, or TransMLA's settings.

Sizes are in values cached per token and layer: the source keeps 2 g d, the result L + R.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mla_deploy.compress.fold import Folding, HeadWeights, rest_keys
from mla_deploy.compress.heads_model import HeadFacts
from mla_deploy.compress.key_basis import (
    Doubles,
    Integers,
    KeyBasis,
    balanced_basis,
    folded_basis,
    mean_rotations,
    plain_basis,
    rotation_scores,
)
from mla_deploy.compress.latent_basis import LatentBasis, joint_latent, plain_latent
from mla_deploy.compress.shared_table import best_pairs
from mla_deploy.compress.stream import LayerMoments
from mla_deploy.errors import InputError

METHODS = ("exact", "low-rank", "transmla")
# No key lies in an exact latent; a graph has some width for them all the same, of zeros.
_EMPTY_NOPE = 8
_MOST_FOLD = 4


@dataclass(frozen=True)
class Settings:
    """`rank` L and `rope` R, the same in every layer; `context` the distances that rotations are
    averaged over; `fold` TransMLA's FreqFold."""

    method: str
    rank: int
    rope: int
    context: int
    fold: int = 2

    @property
    def calibrates(self) -> bool:
        """Whether a text is needed."""
        return self.method != "exact"

    def nope(self, head_dim: int) -> int:
        """N of every head."""
        return head_dim if self.calibrates else _EMPTY_NOPE


def settings_for(
    facts: HeadFacts,
    method: str,
    rank: int | None,
    rope: int | None,
    context: int | None,
) -> Settings:
    """What was asked for, checked. Raises: InputError CMP-RANK, CMP-ROPE, CMP-CONTEXT."""
    keys = facts.groups * facts.head_dim
    reach = facts.context if context is None else context
    if not 1 <= reach <= facts.context:
        raise InputError(
            "CMP-CONTEXT",
            f"a context of {reach} tokens is asked for, the model takes 1 to {facts.context}",
            hint="give the longest context that the model will be used with",
        )
    if rank is None and rope is None:
        return Settings("exact", keys, keys, reach)
    whole = 2 * keys
    turning = _default_rope(facts, method) if rope is None else rope
    if not 2 <= turning <= keys or turning % 2:
        raise InputError(
            "CMP-ROPE",
            f"rope width {turning} is asked for, wanted an even number of 2 to {keys}",
            hint=f"{keys} values of keys turn in the source: {facts.groups} heads of "
            f"{facts.head_dim}",
        )
    kept = whole - turning if rank is None else rank
    if not facts.head_dim <= kept <= whole - turning:
        raise InputError(
            "CMP-RANK",
            f"rank {kept} is asked for, wanted {facts.head_dim} (one head) to {whole - turning} "
            f"(all of {whole} values of keys and values that do not turn)",
            hint="a smaller rank than one head's width holds no head; a larger one holds nothing "
            "more",
        )
    if method == "transmla" and turning != facts.head_dim:
        raise InputError(
            "CMP-ROPE",
            f"TransMLA keeps the rotation of one head: wanted rope width {facts.head_dim}, "
            f"{turning} is asked for",
            hint=f"--rope-dim {facts.head_dim}, or --method low-rank",
        )
    return Settings(method, kept, turning, reach)


def folding(
    settings: Settings,
    weights: HeadWeights,
    moments: LayerMoments | None,
    frequencies_F: Doubles,
    stretch: float,
    *,
    slots_F: Integers | None = None,
) -> Folding:
    """How one layer is written; `moments` are needed for all but the exact form, `slots_F`
    (`shared_table.py`) where all layers turn with one table."""
    groups, half = weights.groups, weights.head_dim // 2
    nope = settings.nope(weights.head_dim)
    if settings.method == "exact" or moments is None:
        basis = plain_basis(groups, half)
        every = np.arange(basis.pairs)
        latent = plain_latent(0, groups * weights.head_dim)
        return Folding(basis, every, latent, np.ones(half, complex), stretch, nope)
    keys = moments.keys(groups)
    if settings.method == "transmla":
        fold = settings.fold if half % settings.fold == 0 else 1
        basis = folded_basis(keys, fold)
        turned = np.arange(half)  # of the first axis of each frequency
        mean_F = np.ones(half, complex)
        latent = _latent(settings, basis, turned, moments, centred=False)
        return Folding(basis, turned, latent, mean_F, stretch, nope)
    basis, mean_F, scores_C = turning_scores(settings, moments, groups, frequencies_F)
    if slots_F is None:
        turned = np.sort(np.argsort(-scores_C, kind="stable")[: settings.rope // 2])
    else:
        turned = best_pairs(scores_C, basis.frequency_C, slots_F)
    latent = _latent(settings, basis, turned, moments, centred=True)
    return Folding(basis, turned, latent, mean_F, stretch, nope)


def turning_scores(
    settings: Settings, moments: LayerMoments, groups: int, frequencies_F: Doubles
) -> tuple[KeyBasis, NDArray[np.complex128], Doubles]:
    """One layer's basis of keys, the mean rotations, and what each pair loses without turning."""
    keys = moments.keys(groups)
    basis = balanced_basis(keys)
    mean_F = mean_rotations(frequencies_F, settings.context)
    return basis, mean_F, rotation_scores(basis, keys, mean_F)


def _latent(
    settings: Settings,
    basis: KeyBasis,
    turned: np.ndarray[tuple[int], np.dtype[np.int64]],
    moments: LayerMoments,
    *,
    centred: bool,
) -> LatentBasis:
    """The joint axes of the pairs that do not turn, and the values."""
    rest = np.setdiff1d(np.arange(basis.pairs), turned)
    to_rest = rest_keys(basis, rest)
    values = len(moments.mean_Z) // 2
    to_y = np.block(
        [
            [to_rest, np.zeros((len(to_rest), values))],
            [np.zeros((values, to_rest.shape[1])), np.eye(values)],
        ]
    )
    moments_YY = to_y @ moments.moments_ZZ @ to_y.T
    mean_Y = to_y @ moments.mean_Z
    return joint_latent(moments_YY, mean_Y, len(to_rest), settings.rank, centred=centred)


def _default_rope(facts: HeadFacts, method: str) -> int:
    """A third of the keys' values, as the facts found best at 75 and 50 % of the bytes."""
    if method == "transmla":
        return facts.head_dim
    third = facts.groups * facts.head_dim // 3
    return max(2, third - third % 2)
