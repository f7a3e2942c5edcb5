"""Rounding with error feedback (GPTQ): what a column loses, the columns after it make good.

A weight W [R, K] meets inputs x whose second moments are H = sum x x^T [K, K]. Rounding one column
after the other, with U the upper Cholesky factor of the inverse of H,

    e_j = (w_j - nearest(w_j)) / U_jj        w_k -= e_j U_jk   for every k > j

keeps the product W x as near as the columns that are left can (Frantar and others, 2210.17323).
Blocks whose inputs are largest go first, and in a block the columns: they lose least then, and
small ones make good what they lose. The grid of a block is fitted to what the feedback has made of
it when its turn comes, by squared errors that weigh as the inputs do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mla_deploy.weight_forms.form import WeightForm
from mla_deploy.weight_forms.rounding import Grid, Quantized, searched_grid

# Of the mean second moment, added to the diagonal. Little fits best to the text itself, and to no
# other kind. SmolLM2 fitted to a manual, squared error of products as a share of what 0.01 without
# an order leaves: on a tale 0.73 (0.03), 0.65 (0.1), 0.61 (0.3), 0.61 (1.0), on the last pages of
# the manual 0.77, 0.77, 0.82, 0.93.
_DAMPINGS = (0.3, 1.0, 3.0)


@dataclass(frozen=True)
class Feedback:
    """Of the inputs of one product, for blocks of one width: `order_K`, columns as they are
    rounded, whole blocks together; `upper_KK`, U of the formula in that order; `importance_K`, what
    an error of each counts, in their own order."""

    order_K: torch.Tensor
    upper_KK: torch.Tensor
    importance_K: torch.Tensor

    @classmethod
    def of(cls, moments_KK: torch.Tensor, width: int) -> Feedback:
        """For second moments of any scale.

        An input that was never seen counts as independent of the others. Moments that are not
        finite, or that no damping makes definite, give rounding to nearest.
        """
        wide_KK = moments_KK.double().clone()
        diagonal_K = wide_KK.diagonal()
        mean = float(diagonal_K.mean()) or 1.0
        diagonal_K[diagonal_K == 0] = mean
        order_K = _order(diagonal_K, width)
        for damping in _DAMPINGS:
            damped_KK = wide_KK / mean + damping * torch.eye(len(wide_KK), dtype=torch.float64)
            upper_KK = _upper_factor(damped_KK[order_K][:, order_K])
            if upper_KK is not None:
                return cls(order_K, upper_KK.float(), damped_KK.diagonal().float())
        columns = len(wide_KK)
        return cls(torch.arange(columns), torch.eye(columns), torch.ones(columns))


def rounded_with_feedback(
    weight_RK: torch.Tensor, feedback: Feedback, form: WeightForm, scale_dtype: str = "fp32"
) -> Quantized:
    """`weight_RK` rounded to `form`; `feedback` is made for the width of its blocks."""
    order_K, upper_KK = feedback.order_K, feedback.upper_KK
    work_KR = weight_RK.T.float()[order_K]  # columns lie together, in the order of their turns
    columns = len(work_KR)
    width = form.width(columns)
    codes: list[torch.Tensor] = [torch.empty(0)] * columns
    grids: list[Grid | None] = [None] * form.blocks(columns)
    start = 0
    while start < columns:
        block = int(order_K[start]) // width
        stop = start + min(width, columns - block * width)
        block_WR, own_W = work_KR[start:stop], order_K[start:stop]
        importance_W = feedback.importance_K[own_W]
        grid = searched_grid(block_WR.T[:, None], form, importance_W, scale_dtype)
        errors_WR = torch.empty_like(block_WR)
        for place, column in enumerate(own_W.tolist()):
            code_R11 = grid.codes(block_WR[place][:, None, None])
            factor_K = upper_KK[start + place]
            error_R = (block_WR[place] - grid.values(code_R11)[:, 0, 0]) / factor_K[start + place]
            block_WR[place + 1 :] -= factor_K[start + place + 1 : stop, None] * error_R
            errors_WR[place] = error_R
            codes[column] = code_R11[:, 0]
        work_KR[stop:] -= upper_KK[start:stop, stop:].T @ errors_WR
        grids[block] = grid
        start = stop
    found = [grid for grid in grids if grid is not None]
    scales = torch.cat([grid.scales for grid in found], dim=-1)
    zeros = [grid.zero_points for grid in found if grid.zero_points is not None]
    whole = Grid(form, scales, torch.cat(zeros, dim=-1) if zeros else None)
    return whole.stored(torch.cat(codes, dim=-1))


def _order(diagonal_K: torch.Tensor, width: int) -> torch.Tensor:
    """Blocks by the mean of their moments, and columns of each by their own, the largest first."""
    blocks = diagonal_K.split(width)
    means = torch.stack([block_W.mean() for block_W in blocks])
    return torch.cat(
        [
            block * width + blocks[block].argsort(descending=True, stable=True)
            for block in means.argsort(descending=True, stable=True).tolist()
        ]
    )


def _upper_factor(moments_KK: torch.Tensor) -> torch.Tensor | None:
    """None where the moments are not definite."""
    lower, failed = torch.linalg.cholesky_ex(moments_KK)
    if int(failed):
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    is_usable = not int(failed) and bool(upper.isfinite().all())
    return upper if is_usable else None
