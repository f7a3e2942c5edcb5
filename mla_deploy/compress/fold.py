"""Bases into weights: the projections of one layer of the source become those of latent attention.

For query head h of key head c(h), with pairs in the key basis and r of them turning:

    q_proj             [ W_q,h                      ]  N = d rows, unchanged
                       [ queries_C2K[r, :, c(h)] W_q,h ]  R rows, real parts, then imaginary ones
    kv_a_proj_with_mqa [ down_LY [keys of the rest; W_v] ]  L rows, its bias centres
                       [ keys_C2K[r] W_k            ]  R rows
    kv_b_proj          W_uk,h = T_h^T up_YL[keys], W_uv,h = up_YL[values of c(h)]
    o_proj             unchanged, its bias takes the mean value

T_h turns q_h into the rest of the pairs, times the mean rotation, so that nothing but q_h itself
need be computed (facts 1.4, step 9).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mla_deploy.compress.key_basis import Doubles, Integers, KeyBasis
from mla_deploy.compress.latent_basis import LatentBasis


@dataclass(frozen=True)
class HeadWeights:
    """Attention of one layer of the source, fp64. D width, H query heads, g key heads of d."""

    query: Doubles  # [H d, D]
    key: Doubles  # [g d, D]
    value: Doubles  # [g d, D]
    out: Doubles  # [D, H d]
    query_bias: Doubles  # [H d], zeros where there is none
    key_bias: Doubles
    value_bias: Doubles
    out_bias: Doubles
    head_dim: int

    @property
    def heads(self) -> int:
        return len(self.query) // self.head_dim

    @property
    def groups(self) -> int:
        return len(self.key) // self.head_dim

    def group_of(self, head: int) -> slice:
        """The values of head `head`'s key head, among those of all."""
        start = head // (self.heads // self.groups) * self.head_dim
        return slice(start, start + self.head_dim)


@dataclass(frozen=True)
class Folding:
    """How one layer is to be written. `mean_F`: see `key_basis.mean_rotations`; 1 where rotations
    are merely dropped. `turned_P`: pairs that keep turning. `stretch`: cos and sin are that long.
    """

    basis: KeyBasis
    turned_P: Integers
    latent: LatentBasis
    mean_F: NDArray[np.complex128]
    stretch: float
    nope: int  # N; d, or the part of d that never turns
    table: int | None = None  # frequencies that a layer chooses from; None: all of the basis's

    @property
    def rest_Q(self) -> Integers:
        """The pairs that do not turn."""
        return np.setdiff1d(np.arange(self.basis.pairs), self.turned_P)


def rest_keys(basis: KeyBasis, rest_Q: Integers) -> Doubles:
    """[2Q, K]: from keys to the pairs that do not turn, real parts, then imaginary ones."""
    return np.concatenate((basis.keys_C2K[rest_Q, 0], basis.keys_C2K[rest_Q, 1]))


def folded(source: HeadWeights, plan: Folding) -> Mapping[str, Doubles]:
    """Weights by their name inside `self_attn`. Biases are zeros where the source has none."""
    turned, rest = plan.turned_P, plan.rest_Q
    rope_key_RK = np.concatenate((plan.basis.keys_C2K[turned, 0], plan.basis.keys_C2K[turned, 1]))
    to_rest_YK = rest_keys(plan.basis, rest)
    content_YD = np.concatenate((to_rest_YK @ source.key, source.value))
    content_bias_Y = np.concatenate((to_rest_YK @ source.key_bias, source.value_bias))
    centred_Y = content_bias_Y - plan.latent.centre_Y
    query, query_bias, expand = [], [], []
    keys = len(to_rest_YK)
    for head, both_Ed in enumerate(query_maps(source, plan)):
        rows = slice(head * source.head_dim, (head + 1) * source.head_dim)
        own = source.group_of(head)
        query.append(both_Ed @ source.query[rows])
        query_bias.append(both_Ed @ source.query_bias[rows])
        w_uk_NL = np.zeros((plan.nope, len(plan.latent.down_LY)))
        if keys:
            nope_Nd, still_Qd = both_Ed[: plan.nope], _still_queries(plan, rest, own)
            w_uk_NL = nope_Nd @ still_Qd.T @ plan.latent.up_YL[:keys]
        values = slice(keys + own.start, keys + own.stop)
        expand.append(np.concatenate((w_uk_NL, plan.latent.up_YL[values])))
    return {
        "q_proj.weight": np.concatenate(query),
        "q_proj.bias": np.concatenate(query_bias),
        "kv_a_proj_with_mqa.weight": np.concatenate(
            (plan.latent.down_LY @ content_YD, rope_key_RK @ source.key)
        ),
        "kv_a_proj_with_mqa.bias": np.concatenate(
            (plan.latent.down_LY @ centred_Y, rope_key_RK @ source.key_bias)
        ),
        "kv_b_proj.weight": np.concatenate(expand),
        "o_proj.weight": source.out,
        "o_proj.bias": source.out_bias + source.out @ mean_values(source, plan),
        "rope_select.weight": _chosen(plan),
    }


def mean_values(source: HeadWeights, plan: Folding) -> Doubles:
    """[H d]: the mean value of every query head, which is in the output bias and in no latent."""
    mean_K = plan.latent.centre_Y[len(plan.latent.centre_Y) - len(source.value) :]
    return np.concatenate([mean_K[source.group_of(head)] for head in range(source.heads)])


def query_maps(source: HeadWeights, plan: Folding) -> list[Doubles]:
    """[E, d] of each query head: from the source's query to the part that asks the latent, N, and
    the one that turns, R."""
    turned, rest, width = plan.turned_P, plan.rest_Q, source.head_dim
    maps = []
    for head in range(source.heads):
        own = source.group_of(head)
        own_C2d = plan.basis.queries_C2K[:, :, own]
        nope_Nd = np.zeros((plan.nope, width))
        if len(rest):
            used = np.arange(width)
            if plan.nope < width:  # only what never turns asks the latent
                used = np.flatnonzero(np.abs(_still_queries(plan, rest, own)).sum(0))
            nope_Nd = np.eye(width)[used]
        maps.append(np.concatenate((nope_Nd, own_C2d[turned, 0], own_C2d[turned, 1])))
    return maps


def _chosen(plan: Folding) -> Doubles:
    """[pairs, frequencies]: which of the table's each pair turns with."""
    columns = int(plan.basis.frequency_C.max()) + 1 if plan.table is None else plan.table
    return np.asarray(np.eye(columns)[plan.basis.frequency_C[plan.turned_P]])


def _still_queries(plan: Folding, rest: Integers, own: slice) -> Doubles:
    """T_h [2Q, d]: the query's pairs that do not turn, times the mean rotation."""
    real_Qd = plan.basis.queries_C2K[rest, 0, own]
    imag_Qd = plan.basis.queries_C2K[rest, 1, own]
    mean_Q = plan.mean_F[plan.basis.frequency_C[rest]] * plan.stretch**2
    cos_Q1, sin_Q1 = mean_Q.real[:, None], mean_Q.imag[:, None]
    return np.concatenate(
        (cos_Q1 * real_Qd - sin_Q1 * imag_Qd, sin_Q1 * real_Qd + cos_Q1 * imag_Qd)
    )
