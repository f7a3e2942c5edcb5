"""Rows of a head in one order: halves of pairs, those that turn first.

Classes lay the pairs of a head out in two ways: (x_l, x_{l + R/2}) as Llama does, or side by side.
A head may also turn its first R values alone. Reordering the rows of queries and keys alike changes
no score, so the rest of `compress` sees one order: pair l is (x_l, x_{l + d/2}), and pairs from R/2
on have the frequency 0.
"""

from __future__ import annotations

import numpy as np

from mla_deploy.compress.key_basis import Doubles, Integers


def order_of_rows(head_dim: int, turning: int, *, side_by_side: bool) -> Integers:
    """[d]: which of the class's rows stands where. `turning` R values of a head turn."""
    rows = np.arange(head_dim)
    first, rest = rows[:turning], rows[turning:]
    cut = len(rest) // 2
    one, other = (first[0::2], first[1::2]) if side_by_side else np.split(first, 2)
    return np.concatenate((one, rest[:cut], other, rest[cut:]))


def reordered(weight: Doubles, order: Integers) -> Doubles:
    """Rows (or values of a bias) of every head in that order."""
    heads = weight.reshape(-1, len(order), *weight.shape[1:])
    return np.ascontiguousarray(heads[:, order]).reshape(weight.shape)
