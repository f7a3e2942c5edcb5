"""Bases in which a latent is stored: c' = down_KL c, and c ~ up_LK c' is what heads read.

    plain      as it is
    hadamard   a signed Hadamard matrix, the norm's weight aside: `export --rotate-latent`
    channel    each channel divided by its root mean square
    pca        its principal axes, each divided by its root mean square
    matched    A^1/2, mixed by Hadamard, with A C A = M: least loss for steps of one size
    cut        the axes that its readers need most, and no others

`up` goes into W_uk and W_uv in each. `down` of the first four does too, into kv_a_proj and the
norm's weight, where the norm only divides (facts: an orthogonal matrix leaves its divisor as it
is, a scale takes the weight's place). The others take one product more for each new token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mla_deploy.compress.native.moments import LatentMoments, damped, power
from mla_deploy.compress.native.sites import Doubles
from mla_deploy.source.latent_rotation import block_of, rotated

PLAIN, HADAMARD, CHANNEL, PCA, MATCHED = "plain", "hadamard", "channel", "pca", "matched"
FOLDED = (PLAIN, HADAMARD, CHANNEL, PCA)
BASES = (*FOLDED, MATCHED)


@dataclass(frozen=True)
class Basis:
    """fp32 matrices; None stands for the identity."""

    down_KL: torch.Tensor | None
    up_LK: torch.Tensor | None

    def kept(self, rank: int) -> Doubles:
        """[L, L]: what is read of a latent that is stored exactly in this basis."""
        if self.down_KL is None or self.up_LK is None:
            return np.eye(rank)
        found: Doubles = (self.up_LK @ self.down_KL).double().numpy()
        return found


class Bases:
    """Those of one site, each made once. `gain_L`: what its norm multiplies by."""

    def __init__(self, moments: LatentMoments, metric_LL: Doubles, gain_L: Doubles) -> None:
        self.second_LL = damped(moments.second_LL)
        self.metric_LL = metric_LL
        # A channel that the norm's weight closes has nothing to be divided by.
        self._gain_L = np.where(np.abs(gain_L) > 0, gain_L, 1.0)
        self._found: dict[str, Basis] = {PLAIN: Basis(None, None)}

    def named(self, name: str) -> Basis:
        """One of `BASES`."""
        if name not in self._found:
            self._found[name] = {
                HADAMARD: self._hadamard,
                CHANNEL: self._channel,
                PCA: self._pca,
                MATCHED: self._matched,
            }[name]()
        return self._found[name]

    def cut(self, rank: int, *, mixed: bool = False) -> Basis:
        """The `rank` axes that matter most to the readers; `mixed` by Hadamard."""
        root_LL, back_LL = power(self.metric_LL, 0.5), power(self.metric_LL, -0.5)
        axes_LK = self.axes_LL[:, :rank]
        down_KL, up_LK = axes_LK.T @ root_LL, back_LL @ axes_LK
        if mixed:
            mix_KK = hadamard(rank)
            down_KL, up_LK = mix_KK @ down_KL, up_LK @ mix_KK.T
        return _basis(down_KL, up_LK)

    @property
    def axes_LL(self) -> Doubles:
        """Of the latent as its readers see it, M^1/2 c, those with most energy first."""
        return self._seen()[1]

    @property
    def energies_L(self) -> Doubles:
        """Along those axes."""
        return self._seen()[0]

    def _seen(self) -> tuple[Doubles, Doubles]:
        root_LL = power(self.metric_LL, 0.5)
        values_L, axes_LL = np.linalg.eigh(root_LL @ self.second_LL @ root_LL)
        return np.maximum(values_L[::-1], 0.0), axes_LL[:, ::-1]

    def _hadamard(self) -> Basis:
        mix_LL = hadamard(len(self._gain_L))
        return _basis(mix_LL / self._gain_L, self._gain_L[:, None] * mix_LL.T)

    def _channel(self) -> Basis:
        size_L = np.sqrt(np.diag(self.second_LL))
        return _basis(np.diag(1.0 / size_L), np.diag(size_L))

    def _pca(self) -> Basis:
        divided_LL = damped(self.second_LL / np.outer(self._gain_L, self._gain_L))
        values_L, axes_LL = np.linalg.eigh(divided_LL)
        size_L = np.sqrt(np.maximum(values_L, np.finfo(float).tiny))
        down_LL = (axes_LL / size_L).T / self._gain_L
        return _basis(down_LL, self._gain_L[:, None] * (axes_LL * size_L))

    def _matched(self) -> Basis:
        root_LL, back_LL = power(self.second_LL, 0.5), power(self.second_LL, -0.5)
        inner_LL = power(root_LL @ self.metric_LL @ root_LL, 0.5)
        both_LL = back_LL @ inner_LL @ back_LL
        both_LL *= len(both_LL) / np.trace(both_LL)
        mix_LL = hadamard(len(both_LL))
        return _basis(mix_LL @ power(both_LL, 0.5), power(both_LL, -0.5) @ mix_LL.T)


def hadamard(rank: int) -> Doubles:
    """The matrix of `latent_rotation.rotated`; the identity where no power of two divides."""
    if block_of(rank) < 2:
        return np.eye(rank)
    found: Doubles = rotated(torch.eye(rank)).double().numpy().T
    return found


def _basis(down_KL: Doubles, up_LK: Doubles) -> Basis:
    return Basis(torch.from_numpy(down_KL).float(), torch.from_numpy(up_LK).float())
