"""The joint axes of what a latent must hold: keys that do not turn, and values.

Both halves are centred, since a constant costs nothing: added to every key it leaves the softmax as
it is, and added to every value it comes out as a constant, which the output bias carries. Then each
half is scaled to the same mean column, so that neither drowns the other, and the principal axes of
both at once are the latent (facts 1.4, steps 6 and 7).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mla_deploy.compress.key_basis import Doubles

_DAMPING = 1e-4


@dataclass(frozen=True)
class LatentBasis:
    """latent = down_LY (y - centre_Y) and y ~ up_YL latent + centre_Y, of y = [keys | values].

    `energy_Y`: variances along the axes, the largest first, of the scaled halves.
    """

    down_LY: Doubles
    up_YL: Doubles
    centre_Y: Doubles
    energy_Y: Doubles

    @property
    def kept(self) -> float:
        """Share of the variance that the latent keeps."""
        total = float(self.energy_Y.sum())
        return 1.0 if total <= 0 else float(self.energy_Y[: len(self.down_LY)].sum()) / total


def plain_latent(keys: int, values: int) -> LatentBasis:
    """The values as they are; keys, if any, are left out."""
    both = keys + values
    up_YL = np.zeros((both, values))
    up_YL[keys:] = np.eye(values)
    return LatentBasis(up_YL.T.copy(), up_YL, np.zeros(both), np.ones(values))


def joint_latent(
    moments_YY: Doubles, mean_Y: Doubles, keys: int, rank: int, *, centred: bool = True
) -> LatentBasis:
    """Principal axes of [keys | values]; the first `keys` values of y are keys."""
    centre_Y = mean_Y if centred else np.zeros_like(mean_Y)
    covariance_YY = moments_YY - np.outer(centre_Y, centre_Y)
    scale_Y = np.ones(len(mean_Y))
    deviation_Y = np.sqrt(np.maximum(np.diag(covariance_YY), 0.0))
    for half in (slice(0, keys), slice(keys, None)):
        size = deviation_Y[half].mean() if deviation_Y[half].size else 0.0
        if size > 0:
            scale_Y[half] = 1.0 / size
    scaled_YY = covariance_YY * np.outer(scale_Y, scale_Y)
    size = len(scaled_YY)
    damped_YY = scaled_YY + np.eye(size) * _DAMPING * np.trace(scaled_YY) / size
    energy_Y, axes_YY = np.linalg.eigh(damped_YY)
    kept_YL = axes_YY[:, ::-1][:, :rank]
    return LatentBasis(
        down_LY=kept_YL.T * scale_Y,
        up_YL=kept_YL / scale_Y[:, None],
        centre_Y=centre_Y,
        energy_Y=energy_Y[::-1].copy(),
    )
