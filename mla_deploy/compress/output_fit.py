"""The output projection, fitted to what the heads give once ranks are cut.

A cut latent gives each head a little less than it had, and heads are related: what one lost another
still tells in part. So the projection that mixes them is fitted again, by least squares on
calibration rows, to what the source's attention adds there:

    min |Y - A W^T - b|^2 + c |W - W_o|^2      A [X, H V] of the cut heads, Y [X, D] of the source

with W_o, the source's own, where rows say nothing. Both see the source's hidden states: fitted to
drifted ones, W would answer for errors of this text's earlier layers.
"""

from __future__ import annotations

from typing import Any

import torch

from mla_deploy.compress.stream import AttendedRows, cache_options, watched_inputs
from mla_deploy.source.cache import CacheRounding

_DAMPING = 1e-2  # c, of the mean square of A's columns


def fit_output(made: Any, rows: AttendedRows, cached: CacheRounding | None, angles: Any) -> None:
    """Replace o_proj of `made`, a layer of ours with `angles` of its own rope. `cached`: as
    `Rows.through` takes it."""
    attention = made.self_attn
    sums: Any = _Sums(attention.o_proj)
    with torch.no_grad(), watched_inputs(attention.o_proj, sums.take):
        for inputs_BSD, given_BSD in rows.pairs():
            sums.wanted_XD = given_BSD.reshape(-1, given_BSD.shape[-1])
            attention(
                hidden_states=inputs_BSD,
                position_embeddings=angles,
                attention_mask=None,
                **cache_options(cached),
            )
    weight_DY, bias_D = sums.solved()
    attention.o_proj.weight.copy_(weight_DY.to(attention.o_proj.weight.dtype))
    attention.o_proj.bias.copy_(bias_D.to(attention.o_proj.bias.dtype))


class _Sums:
    """Second moments of A and of what W_o leaves of Y: of each batch in fp32, their sum in fp64."""

    def __init__(self, projection: Any) -> None:
        self._weight_DY = projection.weight.float()
        width, heads = self._weight_DY.shape
        self.wanted_XD = torch.empty(0)
        self._count = 0
        self._sum_Y = torch.zeros(heads, dtype=torch.float64)
        self._sum_D = torch.zeros(width, dtype=torch.float64)
        self._moments_YY = torch.zeros(heads, heads, dtype=torch.float64)
        self._crossed_YD = torch.zeros(heads, width, dtype=torch.float64)

    def take(self, found_BSY: torch.Tensor) -> None:
        found_XY = found_BSY.reshape(-1, found_BSY.shape[-1])
        left_XD = self.wanted_XD - found_XY @ self._weight_DY.T
        self._count += len(found_XY)
        self._sum_Y += found_XY.sum(0)
        self._sum_D += left_XD.sum(0)
        self._moments_YY += found_XY.T @ found_XY
        self._crossed_YD += found_XY.T @ left_XD

    def solved(self) -> tuple[torch.Tensor, torch.Tensor]:
        """W [D, H V] and b [D]."""
        mean_Y, mean_D = self._sum_Y / self._count, self._sum_D / self._count
        moments_YY = self._moments_YY / self._count - torch.outer(mean_Y, mean_Y)
        crossed_YD = self._crossed_YD / self._count - torch.outer(mean_Y, mean_D)
        damping = _DAMPING * float(moments_YY.diagonal().mean())
        moments_YY.diagonal().add_(max(damping, torch.finfo(torch.float64).tiny))
        more_DY = torch.linalg.solve(moments_YY, crossed_YD).T
        # Y - A W_o^T has the mean mean_D; what W adds to A's mean comes off it.
        return self._weight_DY.double() + more_DY, mean_D - more_DY @ mean_Y
