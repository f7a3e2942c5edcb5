"""An RMS norm that hardly norms: the way through the norms of DeepSeek's classes.

DeepSeek norms its latent, and its query's, where neither a compressed key nor a value may be. So
the vector gets one channel more, of a constant B that comes from the projection's bias, beside
which the rest is small:

    x = [s c, B],   norm(x) = [K s c, B] / rms(x),   rms(x) = sqrt((B^2 + s^2 |c|^2) / L + eps)

With B = K times the size of s c, rms(x) is that of B but for 1 / 2 K^2 of itself. What comes out is
c to a size of about 1 in each channel, and a constant of sqrt(L), by which the next product can add
a bias. A latent's constant is of no use and would take the codes of all others where a cache is in
int8: its weight is 0 there.

How large K may be: a normed input h has |h / g|^2 <= D for the norm's weight g, so |W h|^2 is at
most D |W diag(g)|^2: with s from the Frobenius norm the error is below D / 2 K^2 for any input
whatever. Float formats do not mind: a channel keeps its own exponent, and B, K and s are powers of
two. Only fp16 loses, where s c / rms falls below its normal range: at K = 2^12 less than it rounds
anyway (`tests/compress/test_constant_norm.py` has the sweep). B^2 stays within fp16, for kernels
that square in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mla_deploy.compress.key_basis import Doubles

RATIO = 2.0**12  # K
_CONSTANT = 2.0**7  # B
_EPS = 1e-6  # of DeepSeek's norms on latents, whatever rms_norm_eps says


@dataclass(frozen=True)
class ConstantNorm:
    """`down` [L, D] and `bias` [L] before the norm, its `weight` [L]. After the norm, `undo` times
    the channels is the projection again, and `one` times the last channel is 1.
    """

    down: Doubles
    bias: Doubles
    weight: Doubles
    undo: float
    one: float


def constant_norm(
    down: Doubles, bias: Doubles, gain_D: Doubles, ratio: float = RATIO
) -> ConstantNorm:
    """Of a projection [L - 1, D] with its bias, of inputs normed with weight `gain_D`."""
    size = math.sqrt(float(((down * gain_D) ** 2).sum() + (bias**2).sum()))
    scale = 2.0 ** math.floor(math.log2(_CONSTANT / ratio / size)) if size > 0 else 1.0
    width = len(down) + 1
    rms = math.sqrt((_CONSTANT**2 + (scale * size) ** 2) / width + _EPS)
    return ConstantNorm(
        down=np.concatenate((scale * down, np.zeros((1, down.shape[1])))),
        bias=np.concatenate((scale * bias, [_CONSTANT])),
        weight=np.array([ratio] * len(down) + [1.0]),
        undo=rms / scale / ratio,
        one=rms / _CONSTANT,
    )
