"""A layer written so that few bits store its cache well: nothing else about it changes.

One scale serves a whole tile of values, so what is stored should be about as large everywhere, and
as much asked of. Both parts of a cached row may be written in another basis at no loss:

    rope key   pair c times s_c, its queries by 1 / s_c, s_c^4 = E|q_c|^2 / E|k_c|^2; the pairs in
               order of what they carry, so that a tile holds like ones
    latent     c' = Q S^(-1/4) c with S the covariance of c, W_uk and W_uv times its inverse. Equal
               steps cost tr(T S T^T) tr((T^T T)^-1) of a basis T, which is least there; the fixed
               orthogonal Q then lets no channel stand out

Both are about 1 large then, as 16-bit scales like it.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np

from mla_deploy.compress.fold import Folding, HeadWeights, rest_keys
from mla_deploy.compress.key_basis import Doubles, KeyBasis, asked_of_pairs, pair_energies
from mla_deploy.compress.stream import LayerMoments

_SEED = 20261127
_LEAST = 1e-6  # of the mean: what calibration never saw still has an inverse


def evened(plan: Folding, weights: HeadWeights, moments: LayerMoments) -> Folding:
    """`plan` in a basis that is stored with the least loss; it computes the same."""
    keys = moments.keys(weights.groups)
    had_C = pair_energies(plan.basis, keys)
    asked_C = asked_of_pairs(plan.basis, keys)
    scale_C = (_damped(asked_C) / _damped(had_C)) ** 0.25
    scale_C /= np.sqrt(_damped(had_C * scale_C**2).mean() / 2)
    basis = KeyBasis(
        plan.basis.keys_C2K * scale_C[:, None, None],
        plan.basis.queries_C2K / scale_C[:, None, None],
        plan.basis.frequency_C,
    )
    carried_P = (had_C * asked_C)[plan.turned_P]
    turned_P = plan.turned_P[np.argsort(-carried_P, kind="stable")]
    # The latent's keys are rows of the basis, which have just been scaled.
    rest_Q = plan.rest_Q
    scale_Y = np.ones(len(plan.latent.centre_Y))
    scale_Y[: 2 * len(rest_Q)] = np.tile(scale_C[rest_Q], 2)
    down_LY, up_YL = plan.latent.down_LY / scale_Y, plan.latent.up_YL * scale_Y[:, None]
    turn_LL, back_LL = _even_latent(plan, moments)
    latent = replace(
        plan.latent,
        down_LY=turn_LL @ down_LY,
        up_YL=up_YL @ back_LL,
        centre_Y=plan.latent.centre_Y * scale_Y,
    )
    return replace(plan, basis=basis, turned_P=turned_P, latent=latent)


def _even_latent(plan: Folding, moments: LayerMoments) -> tuple[Doubles, Doubles]:
    """T and its inverse, of the latent as `plan` has it."""
    rest_YK = rest_keys(plan.basis, plan.rest_Q)
    down_LZ = np.concatenate(
        (plan.latent.down_LY[:, : len(rest_YK)] @ rest_YK, plan.latent.down_LY[:, len(rest_YK) :]),
        axis=1,
    )
    mean_L = down_LZ @ moments.mean_Z
    covariance_LL = down_LZ @ moments.moments_ZZ @ down_LZ.T - np.outer(mean_L, mean_L)
    energy_L, axes_LL = np.linalg.eigh((covariance_LL + covariance_LL.T) / 2)
    root_L = _damped(np.maximum(energy_L, 0.0)) ** 0.25
    root_L *= np.sqrt(np.sqrt(np.maximum(energy_L, 0.0)).mean()) or 1.0
    turn_LL = _orthogonal(len(root_L))
    return turn_LL @ ((axes_LL / root_L) @ axes_LL.T), (axes_LL * root_L) @ axes_LL.T @ turn_LL.T


def _damped(values: Doubles) -> Doubles:
    return values + max(float(values.mean()) * _LEAST, float(np.finfo(np.float32).tiny))


@functools.lru_cache(maxsize=4)
def _orthogonal(size: int) -> Doubles:
    """Fixed, and flat enough at any size; a Hadamard matrix wants a power of two."""
    drawn = np.random.default_rng(_SEED).normal(size=(size, size))
    found: Doubles = np.linalg.qr(drawn)[0]
    return found
