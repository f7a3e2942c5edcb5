"""Rounding with error feedback (GPTQ): what a column loses, the columns after it make good.

A weight W [R, K] meets inputs x whose second moments are H = sum x x^T [K, K]. Rounding one column
after the other, with U the upper Cholesky factor of the inverse of H,

    e_j = (w_j - nearest(w_j)) / U_jj        w_k -= e_j U_jk   for every k > j

keeps the product W x as near as the columns that are left can (Frantar and others, 2210.17323).
The grid of a block is fitted to what the feedback has made of it when its first column is reached.
"""

from __future__ import annotations

import torch

from mla_deploy.weight_forms.form import WeightForm
from mla_deploy.weight_forms.rounding import Grid, Quantized, blocked_weight, fitted_grid

# Of the mean second moment, added to the diagonal: keeps directions near that were hardly seen.
_DAMPINGS = (0.01, 0.1, 1.0)


def upper_factor(moments_KK: torch.Tensor) -> torch.Tensor:
    """U of the formula, fp64, for second moments of any scale.

    An input that was never seen counts as independent of the others. Moments that are not finite,
    or that no damping makes definite, give the identity: rounding to nearest.
    """
    wide_KK = moments_KK.double().clone()
    diagonal_K = wide_KK.diagonal()
    mean = float(diagonal_K.mean()) or 1.0
    diagonal_K[diagonal_K == 0] = mean
    identity_KK = torch.eye(len(wide_KK), dtype=torch.float64)
    for damping in _DAMPINGS:
        lower, failed = torch.linalg.cholesky_ex(wide_KK + damping * mean * identity_KK)
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed) and bool(upper.isfinite().all()):
                return upper
    return identity_KK


def rounded_with_feedback(
    weight_RK: torch.Tensor, upper_KK: torch.Tensor, form: WeightForm, scale_dtype: str = "fp32"
) -> Quantized:
    """`weight_RK` rounded to `form`; `upper_KK` as `upper_factor` gives it."""
    work_KR = weight_RK.T.double().contiguous()  # columns lie together
    columns = len(work_KR)
    width = form.width(columns)
    codes: list[torch.Tensor] = []
    grids: list[Grid] = []
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        block_WR = work_KR[start:stop]
        grid = fitted_grid(blocked_weight(block_WR.T.float(), form), form, scale_dtype)
        errors_WR = torch.empty_like(block_WR)
        for place in range(stop - start):
            code_R11 = grid.codes(block_WR[place].float()[:, None, None])
            factor_K = upper_KK[start + place]
            error_R = (block_WR[place] - grid.values(code_R11)[:, 0, 0]) / factor_K[start + place]
            block_WR[place + 1 :] -= factor_K[start + place + 1 : stop, None] * error_R
            errors_WR[place] = error_R
            codes.append(code_R11[:, 0])
        work_KR[stop:] -= upper_KK[start:stop, stop:].T @ errors_WR
        grids.append(grid)
    scales = torch.cat([grid.scales for grid in grids], dim=-1)
    zeros = [grid.zero_points for grid in grids if grid.zero_points is not None]
    whole = Grid(form, scales, torch.cat(zeros, dim=-1) if zeros else None)
    return whole.stored(torch.cat(codes, dim=-1))
