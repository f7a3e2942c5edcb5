"""What a latent holds on a text, and what its readers ask of it, as two matrices.

    C = E[c c^T]                                                       c  latent, after its norm
    M = sum_h W_uk^T E[q q^T] W_uk  +  b sum_h W_uv^T W_o^T W_o W_uv   q  query, without its rope

An error e of the latent costs its readers about E[e^T M e]: of the scores, and of the output. `b`
makes both shares alike: tr(C M_keys) = b tr(C M_values).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mla_deploy.compress.native.sites import Doubles, Site, SiteWeights
from mla_deploy.errors import InputError

_CHUNK = 4096  # tokens that are widened to fp64 at a time
_DAMPING = 1e-6  # of the mean of a diagonal


@dataclass(frozen=True)
class LatentMoments:
    """Means over `tokens` tokens. `channels_L` are root mean squares."""

    second_LL: Doubles
    queries_HNN: Doubles
    tokens: int

    @property
    def channels_L(self) -> Doubles:
        found: Doubles = np.sqrt(np.diag(self.second_LL))
        return found


class MomentsOf:
    """Collects the moments of one site as its latents and queries come by."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.tokens = 0
        self._second_LL = np.zeros((site.rank, site.rank))
        self._queries_HNN = np.zeros((site.heads, site.nope, site.nope))

    def latent(self, latent_B1TL: torch.Tensor) -> None:
        """Raises: InputError CMP-NONFINITE."""
        for c_XL in latent_B1TL.reshape(-1, self.site.rank).split(_CHUNK):
            wide_XL = self._finite(c_XL, "latents")
            self._second_LL += (wide_XL.T @ wide_XL).numpy()
            self.tokens += len(wide_XL)

    def query(self, query_BHSE: torch.Tensor) -> None:
        """Raises: InputError CMP-NONFINITE."""
        q_HXN = query_BHSE[..., : self.site.nope].transpose(0, 1).flatten(1, 2)
        for part_HXN in q_HXN.split(_CHUNK, dim=1):
            wide_HXN = self._finite(part_HXN, "queries")
            self._queries_HNN += (wide_HXN.transpose(1, 2) @ wide_HXN).numpy()

    def done(self) -> LatentMoments:
        count = max(self.tokens, 1)
        return LatentMoments(self._second_LL / count, self._queries_HNN / count, self.tokens)

    def _finite(self, values: torch.Tensor, what: str) -> torch.Tensor:
        wide = values.double()
        if not bool(wide.isfinite().all()):
            raise InputError(
                "CMP-NONFINITE",
                f"{what} of {self.site.path} are not finite on the calibration text",
                hint="the checkpoint overflows in fp32, or is damaged; nothing can be measured",
                layer=self.site.path,
            )
        return wide


def reader_metric(weights: SiteWeights, moments: LatentMoments) -> Doubles:
    """M [L, L], damped so that it has a root and an inverse."""
    asked_HNL = np.einsum("hnm,hml->hnl", moments.queries_HNN, weights.w_uk_HNL)
    keys_LL = np.einsum("hnk,hnl->kl", weights.w_uk_HNL, asked_HNL)
    read_HDL = weights.w_uv_HVL
    if weights.w_o_HDV is not None:
        read_HDL = np.einsum("hdv,hvl->hdl", weights.w_o_HDV, weights.w_uv_HVL)
    values_LL = np.einsum("hdk,hdl->kl", read_HDL, read_HDL)
    total = 0.0 * keys_LL
    for part_LL in (keys_LL, values_LL):
        share = float((moments.second_LL * part_LL).sum())
        if share > 0:
            total = total + part_LL / share
    return damped(total)


def damped(matrix_LL: Doubles) -> Doubles:
    """Symmetric, with a little on its diagonal."""
    rank = len(matrix_LL)
    even = (matrix_LL + matrix_LL.T) / 2
    size = float(np.trace(even)) / rank
    found: Doubles = even + np.eye(rank) * (_DAMPING * size if size > 0 else 1.0)
    return found


def power(matrix_LL: Doubles, exponent: float) -> Doubles:
    """Of a symmetric matrix without negative eigenvalues."""
    values_L, axes_LL = np.linalg.eigh(matrix_LL)
    floor = np.finfo(float).eps * max(float(values_L[-1]), np.finfo(float).tiny)
    found: Doubles = (axes_LL * np.maximum(values_L, floor) ** exponent) @ axes_LL.T
    return found


def effective_rank(energies_L: Doubles) -> float:
    """exp of the entropy of the shares: how many directions there would be, were all alike."""
    shares = np.maximum(energies_L, 0.0) / max(float(energies_L.sum()), np.finfo(float).tiny)
    kept = shares[shares > 0]
    return float(np.exp(-(kept * np.log(kept)).sum()))
