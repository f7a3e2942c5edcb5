"""Which form a layer takes: exact, the low-rank one found best, or TransMLA's settings.

Sizes are in values cached per token and layer: the source keeps 2 g d, the result L + R.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mla_deploy.compress.even_basis import evened
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
from mla_deploy.latent_store import STORES

METHODS = ("exact", "low-rank", "transmla")
# Where every key turns, none lies in an exact latent; a graph has some width for them all the same,
# of zeros.
_EMPTY_NOPE = 8
_MOST_FOLD = 4


@dataclass(frozen=True)
class Settings:
    """Of one layer: `rank` L and `rope` R; `nope` N of every head; `context` the distances that
    rotations are averaged over; `fold` TransMLA's FreqFold; `is_stored`: in fewer than 16 bits;
    `is_fitted`: the output projection is fitted to what is left (`output_fit.py`).
    """

    method: str
    rank: int
    rope: int
    nope: int
    context: int
    fold: int = 2
    is_stored: bool = False
    is_fitted: bool = False


@dataclass(frozen=True)
class Form:
    """How a model is written: layer by layer, and how its cache is stored (`--cache-dtype`; None:
    as its weights are, 16 bits where bytes are counted)."""

    layers: tuple[Settings, ...]
    cache: str | None = None

    @property
    def method(self) -> str:
        return self.layers[0].method

    @property
    def usual(self) -> Settings:
        """What most layers are like."""
        return Counter(self.layers).most_common(1)[0][0]

    @property
    def calibrates(self) -> bool:
        """Whether a text is needed."""
        return self.method != "exact"

    @property
    def is_fitted(self) -> bool:
        """Whether some layer is."""
        return any(each.is_fitted for each in self.layers)

    @property
    def cached_values(self) -> int:
        """Of a token, in all layers."""
        return sum(each.rank + each.rope for each in self.layers)

    @property
    def cached_bytes(self) -> int:
        """Of a token, in all layers: codes and scales."""
        store = STORES.get(self.cache or "")
        if store is None:
            return 2 * self.cached_values
        return sum(store.row_bytes(each.rank, each.rope) for each in self.layers)


def form_of(
    facts: HeadFacts, widths: Sequence[tuple[int, int]], context: int, cache: str | None = None
) -> Form:
    """Low-rank layers of (L, R) each; where every key turns in all of them nothing but 16 or fewer
    bits loses anything, and no key lies in a latent."""
    nope = _nope(facts, cut=any(rope < facts.turning_values for _, rope in widths))
    stored = cache in STORES

    def of(rank: int, rope: int) -> Settings:
        fitted = rank + rope < sum(facts.exact_widths)
        return Settings("low-rank", rank, rope, nope, context, is_stored=stored, is_fitted=fitted)

    return Form(tuple(of(rank, rope) for rank, rope in widths), cache)


def _nope(facts: HeadFacts, *, cut: bool) -> int:
    """N: all of a head where some of its pairs lost their rotation, else what never had one."""
    return facts.head_dim if cut else facts.head_dim - facts.turning or _EMPTY_NOPE


def form_for(facts: HeadFacts, method: str, rank: int | None, rope: int | None, reach: int) -> Form:
    """Every layer as was asked for, checked. Raises: InputError CMP-RANK, CMP-ROPE."""
    return Form((_settings(facts, method, rank, rope, reach),) * facts.layers)


def _settings(
    facts: HeadFacts, method: str, rank: int | None, rope: int | None, reach: int
) -> Settings:
    keys = facts.groups * facts.head_dim
    whole, most = 2 * keys, facts.turning_values
    if rank is None and rope is None:
        return Settings("exact", whole - most, most, _nope(facts, cut=False), reach)
    turning = _default_rope(facts, method) if rope is None else rope
    if not 2 <= turning <= most or turning % 2:
        raise InputError(
            "CMP-ROPE",
            f"rope width {turning} is asked for, wanted an even number of 2 to {most}",
            hint=f"{most} values of keys turn in the source: {facts.turning} of each of "
            f"{facts.groups} heads",
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
    if method == "transmla" and turning != facts.turning:
        raise InputError(
            "CMP-ROPE",
            f"TransMLA keeps the rotation of one head: wanted rope width {facts.turning}, "
            f"{turning} is asked for",
            hint=f"--rope-dim {facts.turning}, or --method low-rank",
        )
    fitted = method == "low-rank" and kept + turning < whole
    return Settings(method, kept, turning, facts.head_dim, reach, is_fitted=fitted)


def reach_of(facts: HeadFacts, context: int | None) -> int:
    """The context that was asked for. Raises: InputError CMP-CONTEXT."""
    reach = facts.context if context is None else context
    if not 1 <= reach <= facts.context:
        raise InputError(
            "CMP-CONTEXT",
            f"a context of {reach} tokens is asked for, the model takes 1 to {facts.context}",
            hint="give the longest context that the model will be used with",
        )
    return reach


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
    nope, turns = settings.nope, int(np.count_nonzero(frequencies_F > 0))
    if settings.method == "exact" or moments is None:
        basis = plain_basis(groups, half)
        turned = np.flatnonzero(frequencies_F[basis.frequency_C] > 0)
        rest = 2 * (basis.pairs - len(turned))
        latent = plain_latent(0, rest + groups * weights.head_dim)
        mean_F = _still_as_they_are(np.ones(half, complex), frequencies_F, stretch)
        return Folding(basis, turned, latent, mean_F, stretch, nope, turns)
    keys = moments.keys(groups)
    if settings.method == "transmla":
        fold = settings.fold if half % settings.fold == turns % settings.fold == 0 else 1
        basis = folded_basis(keys, fold)
        turned = np.arange(turns)  # of the first axis of each frequency
        mean_F = _still_as_they_are(np.ones(half, complex), frequencies_F, stretch)
        latent = _latent(settings, basis, turned, moments, centred=False)
        return Folding(basis, turned, latent, mean_F, stretch, nope, turns)
    basis, mean_F, scores_C = turning_scores(settings, moments, groups, frequencies_F)
    mean_F = _still_as_they_are(mean_F, frequencies_F, stretch)
    if slots_F is None:
        turned = np.sort(np.argsort(-scores_C, kind="stable")[: settings.rope // 2])
    else:
        turned = best_pairs(scores_C, basis.frequency_C, slots_F)
    latent = _latent(settings, basis, turned, moments, centred=True)
    plan = Folding(basis, turned, latent, mean_F, stretch, nope, turns)
    return evened(plan, weights, moments) if settings.is_stored else plan


def turning_scores(
    settings: Settings, moments: LayerMoments, groups: int, frequencies_F: Doubles
) -> tuple[KeyBasis, NDArray[np.complex128], Doubles]:
    """One layer's basis of keys, the mean rotations, and what each pair loses without turning."""
    keys = moments.keys(groups)
    basis = balanced_basis(keys)
    mean_F = mean_rotations(frequencies_F, settings.context)
    scores_C = rotation_scores(basis, keys, mean_F)
    scores_C[frequencies_F[basis.frequency_C] == 0] = -1.0  # there is no rotation to keep
    return basis, mean_F, scores_C


def _still_as_they_are(
    mean_F: NDArray[np.complex128], frequencies_F: Doubles, stretch: float
) -> NDArray[np.complex128]:
    """A pair that never turns is not stretched either, which its mean makes up for."""
    return np.where(frequencies_F > 0, mean_F, 1.0 / stretch**2)


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
        return facts.turning
    third = facts.groups * facts.head_dim // 3
    return min(max(2, third - third % 2), facts.turning_values)
