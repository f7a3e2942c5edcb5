"""How the heads of one layer lie to each other in the latent, and what each has left of a cut one.

Head i reads k_i = W_i c. From C = E[c c^T], with K_ij = W_i C W_j^T = E[k_i k_j^T]:

    cosine   tr K_ij / sqrt(tr K_ii tr K_jj)        do both point the same way, axis by axis?
    shared   |K_ij|^2 / (|K_ii| |K_jj|)             do both read the same directions of the latent,
                                                    whatever axes they write them in? (linear CKA)

With the identity for C these speak of the weights alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mla_deploy.compress.native.sites import Doubles, SiteWeights

_MOST = 32  # heads of a map; of more, neighbours are averaged
_TINY = np.finfo(float).tiny
Map = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Alike:
    """Of the keys, or the values, of one layer. Means and the largest are over pairs of two heads;
    maps are [H, H], of `group` heads a cell."""

    cosine_mean: float  # of absolute values
    cosine_most: float
    pair: tuple[int, int]  # the two heads of the largest
    shared_mean: float
    group: int
    cosine: Map
    shared: Map

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def alike(w_HNL: Doubles, second_LL: Doubles) -> Alike:
    """Of heads that read a latent of second moments `second_LL` with `w_HNL`."""
    heads = len(w_HNL)
    traces_HH, norms_HH = np.zeros((heads, heads)), np.zeros((heads, heads))
    for index, own_NL in enumerate(w_HNL):
        blocks_HNN = np.einsum("nl,hml->hnm", own_NL @ second_LL, w_HNL, optimize=True)
        traces_HH[index] = np.trace(blocks_HNN, axis1=1, axis2=2)
        norms_HH[index] = (blocks_HNN**2).sum((1, 2))
    size_H = np.sqrt(np.maximum(np.diag(traces_HH), _TINY))
    cosine_HH = traces_HH / np.outer(size_H, size_H)
    weight_H = np.sqrt(np.maximum(np.diag(norms_HH), _TINY))
    shared_HH = norms_HH / np.outer(weight_H, weight_H)
    above = np.triu_indices(heads, 1)
    pairs = np.abs(cosine_HH[above])
    most = int(pairs.argmax()) if len(pairs) else 0
    group = -(-heads // _MOST)
    return Alike(
        cosine_mean=float(pairs.mean()) if len(pairs) else 0.0,
        cosine_most=float(cosine_HH[above][most]) if len(pairs) else 0.0,
        pair=(int(above[0][most]), int(above[1][most])) if len(pairs) else (0, 0),
        shared_mean=float(shared_HH[above].mean()) if len(pairs) else 0.0,
        group=group,
        cosine=_map(cosine_HH, group),
        shared=_map(shared_HH, group),
    )


def head_cosines(w_HNL: Doubles, second_LL: Doubles, kept_LL: Doubles) -> tuple[float, ...]:
    """Cosine between what each head reads of c, and of `kept_LL` c in its place."""
    both = [second_LL, second_LL @ kept_LL.T, kept_LL @ second_LL @ kept_LL.T]
    had, crossed, got = (
        np.einsum("hnk,kl,hnl->h", w_HNL, each, w_HNL, optimize=True) for each in both
    )
    return tuple((crossed / np.sqrt(np.maximum(had * got, _TINY))).tolist())


def weight_energies(weights: SiteWeights) -> Doubles:
    """Squares of the singular values of kv_b, the largest first."""
    stacked = np.concatenate(
        (weights.w_uk_HNL.reshape(-1, weights.w_uk_HNL.shape[-1]),
         weights.w_uv_HVL.reshape(-1, weights.w_uv_HVL.shape[-1]))
    )  # fmt: skip
    found: Doubles = np.maximum(np.linalg.eigvalsh(stacked.T @ stacked)[::-1], 0.0)
    return found


def _map(values_HH: Doubles, group: int) -> Map:
    starts = np.arange(0, len(values_HH), group)
    summed = np.add.reduceat(np.add.reduceat(values_HH, starts, 0), starts, 1)
    counts = np.diff(np.append(starts, len(values_HH)))
    means = summed / np.outer(counts, counts)
    return tuple(tuple(round(float(each), 4) for each in row) for row in means)
