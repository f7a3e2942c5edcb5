"""Where the rotary pairs of all key heads are turned among themselves, and which keep turning.

A pair of a key head is a complex number that position m multiplies by e^(i m theta). Any complex
matrix over the heads' numbers of one frequency commutes with that, so keys may be written in
another basis of each frequency at no loss; queries take the inverse. The basis here lets few pairs
carry most of what the scores need. Those keep their rotation, with a frequency of their own; the
others keep its mean over the distances of a context, a constant, and can then go into the latent.

The method is the one that `../shared/facts/compression.md` 1.4 found best; TransMLA's settings
(arXiv 2502.07864: real PCA, the first head keeps its rotation, frequencies folded) are beside it.

Axes: K values of all key heads (g x d, head by head, each half split as in Llama), C pairs
(g x d/2), F frequencies (d/2), two for real and imaginary part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]
# Of a covariance's mean eigenvalue, added to all: a direction that calibration never saw.
_DAMPING = 1e-4


@dataclass(frozen=True)
class KeyBasis:
    """Pairs C of all key heads in a new basis: pair = keys_C2K k; queries take queries_C2K."""

    keys_C2K: Doubles
    queries_C2K: Doubles
    frequency_C: Integers

    @property
    def pairs(self) -> int:
        return len(self.frequency_C)


@dataclass(frozen=True)
class KeyMoments:
    """What calibration says of one layer: E[k k^T], and E|q|^2 of each query head and frequency."""

    keys_KK: Doubles
    queries_HF: Doubles
    groups: int

    @property
    def frequencies(self) -> int:
        return len(self.keys_KK) // self.groups // 2

    @property
    def group_of_head(self) -> Integers:
        heads = len(self.queries_HF)
        return np.arange(heads) // (heads // self.groups)


def plain_basis(groups: int, frequencies: int) -> KeyBasis:
    """Every pair as it is: pair c F + l is that of head c and frequency l."""
    values = groups * frequencies * 2
    keys_C2K = np.zeros((groups * frequencies, 2, values))
    frequency_C = np.tile(np.arange(frequencies), groups)
    for head in range(groups):
        for index in range(frequencies):
            for part in range(2):
                column = head * 2 * frequencies + part * frequencies + index
                keys_C2K[head * frequencies + index, part, column] = 1.0
    return KeyBasis(keys_C2K, keys_C2K.copy(), frequency_C)


def balanced_basis(moments: KeyMoments) -> KeyBasis:
    """Complex principal axes of each frequency, of keys weighted by what queries ask of them."""
    groups, frequencies = moments.groups, moments.frequencies
    asked_GF = np.zeros((groups, frequencies))
    np.add.at(asked_GF, moments.group_of_head, moments.queries_HF)
    weight_GF = np.sqrt(asked_GF)
    weight_GF /= np.maximum(weight_GF.mean(0), np.finfo(float).tiny)
    weight_GF = np.maximum(weight_GF, 1e-3)  # a head that no query asks still has an inverse
    matrices = []
    for index in range(frequencies):
        weight_G = weight_GF[:, index]
        covariance_GG = _complex_covariance(moments, index) * np.outer(weight_G, weight_G)
        axes_GG = _principal(covariance_GG)
        matrices.append(axes_GG.conj().T * weight_G)
    return _from_complex(matrices)


def folded_basis(moments: KeyMoments, fold: int) -> KeyBasis:
    """TransMLA's: real principal axes over the heads of `fold` neighbouring frequencies at once.

    Pair c F + l is the c-th axis; its frequency is that of l, one of those it mixes.
    """
    groups, frequencies = moments.groups, moments.frequencies
    plain = plain_basis(groups, frequencies)
    keys_C2K = np.zeros_like(plain.keys_C2K)
    for first in range(0, frequencies, fold):
        members = [c * frequencies + first + f for c in range(groups) for f in range(fold)]
        rows_M2K = plain.keys_C2K[members]
        covariance = sum(
            rows_M2K[:, part] @ moments.keys_KK @ rows_M2K[:, part].T for part in range(2)
        )
        axes_MM = _principal(np.asarray(covariance), damping=1e-2).T
        places = [c * frequencies + first + f for c in range(groups) for f in range(fold)]
        keys_C2K[places] = np.einsum("nm,mpk->npk", axes_MM, rows_M2K)
    return KeyBasis(keys_C2K, keys_C2K.copy(), plain.frequency_C)  # orthogonal: its own inverse


def mean_rotations(inverse_frequencies_F: Doubles, context: int) -> NDArray[np.complex128]:
    """Mean of e^(i theta D) over distances D below `context`, near ones counting as 1 / (1 + D)."""
    distances_X = np.arange(context)
    weights_X = 1.0 / (1.0 + distances_X)
    weights_X /= weights_X.sum()
    turned_FX = np.exp(1j * inverse_frequencies_F[:, None] * distances_X)
    mean: NDArray[np.complex128] = turned_FX @ weights_X
    return mean


def rotation_scores(
    basis: KeyBasis, moments: KeyMoments, mean_F: NDArray[np.complex128]
) -> Doubles:
    """[C]: the score variance that is lost when a pair's rotation becomes its mean."""
    both_C = pair_energies(basis, moments) * asked_of_pairs(basis, moments)
    lost: Doubles = both_C * (1.0 - np.abs(mean_F[basis.frequency_C]) ** 2)
    return lost


def pair_energies(basis: KeyBasis, moments: KeyMoments) -> Doubles:
    """[C]: E|k|^2 of each pair."""
    found: Doubles = np.einsum("cpk,kl,cpl->c", basis.keys_C2K, moments.keys_KK, basis.keys_C2K)
    return found


def asked_of_pairs(basis: KeyBasis, moments: KeyMoments) -> Doubles:
    """[C]: E|q|^2 of each pair, over all query heads."""
    width = 2 * moments.frequencies
    asked_C = np.zeros(basis.pairs)
    for head, group in enumerate(moments.group_of_head):
        start = int(group) * width
        own_C2D = basis.queries_C2K[:, :, start : start + width]
        energy_F = moments.queries_HF[head] / 2  # of each of the two parts
        energy_D = np.concatenate((energy_F, energy_F))
        asked_C += np.einsum("cpd,d,cpd->c", own_C2D, energy_D, own_C2D)
    return asked_C


def _complex_covariance(moments: KeyMoments, index: int) -> NDArray[np.complex128]:
    """E[k k^H] over the heads, of one frequency."""
    groups, frequencies = moments.groups, moments.frequencies
    real = np.arange(groups) * 2 * frequencies + index
    imag = real + frequencies
    keys = moments.keys_KK
    both = keys[np.ix_(real, real)] + keys[np.ix_(imag, imag)]
    crossed = keys[np.ix_(imag, real)] - keys[np.ix_(real, imag)]
    covariance: NDArray[np.complex128] = both + 1j * crossed
    return covariance


def _principal(covariance: NDArray[Any], damping: float = _DAMPING) -> NDArray[Any]:
    """Eigenvectors as columns, the largest first."""
    size = len(covariance)
    damped = covariance + np.eye(size) * damping * np.trace(covariance).real / size
    _, vectors = np.linalg.eigh(damped)
    return np.asarray(vectors[:, ::-1])


def _from_complex(matrices: list[NDArray[Any]]) -> KeyBasis:
    """Of one matrix [g, g] a frequency: the real form, and its inverse transposed for queries."""
    frequencies, groups = len(matrices), len(matrices[0])
    shape = (groups * frequencies, 2, groups * 2 * frequencies)
    keys_C2K, queries_C2K = np.zeros(shape), np.zeros(shape)
    for index, matrix_GG in enumerate(matrices):
        # k^H q = (M k)^H (M^-H q)
        inverse_GG = np.linalg.inv(matrix_GG).conj().T
        for into, matrix in ((keys_C2K, matrix_GG), (queries_C2K, inverse_GG)):
            for row in range(groups):
                for head in range(groups):
                    value = complex(matrix[row, head])
                    real = head * 2 * frequencies + index
                    imag = real + frequencies
                    pair = row * frequencies + index
                    into[pair, 0, real], into[pair, 0, imag] = value.real, -value.imag
                    into[pair, 1, real], into[pair, 1, imag] = value.imag, value.real
    frequency_C = np.tile(np.arange(frequencies), groups)
    return KeyBasis(keys_C2K, queries_C2K, frequency_C)
