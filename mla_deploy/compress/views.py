"""Two views of what a latent keeps, layer by layer, from the statistics of the calibration text.

As matrices: how far each head's keys and values are from those that come back out of the latent,
and how much of the variance a latent of each width would keep, of activations and of weights alone.
As directions: the cosine between what each head had and what it gets, the angle between the
directions that it uses most, and how alike the heads of one layer are.

All of it follows from E[z], E[z z^T] of z = [keys | values]: reconstruction is affine in z.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_deploy.compress.fold import Folding, HeadWeights, rest_keys
from mla_deploy.compress.key_basis import Doubles, Integers
from mla_deploy.compress.latent_basis import joint_latent
from mla_deploy.compress.stream import LayerMoments

_POINTS = 24  # of an energy curve
_TINY = np.finfo(float).tiny


@dataclass(frozen=True)
class LayerView:
    """One layer; lists go by key head. Energies are (width, share kept) pairs."""

    key_error: tuple[float, ...]  # |k - k'| / |k|, root mean square
    value_error: tuple[float, ...]
    key_cosine: tuple[float, ...]
    value_cosine: tuple[float, ...]
    key_angle: tuple[float, ...]  # degrees, between the directions used most
    alike: tuple[tuple[float, ...], ...]  # correlation of keys, head by head
    alike_after: tuple[tuple[float, ...], ...]
    compass: tuple[tuple[float, float, float, float], ...]  # x, y before; x, y after
    energy: tuple[tuple[int, float], ...]
    weight_energy: tuple[tuple[int, float], ...]
    turning: tuple[tuple[int, int], ...]  # (axis, frequency) of the pairs that keep turning

    def to_dict(self) -> dict[str, Any]:
        return {
            name: [list(each) if isinstance(each, tuple) else each for each in value]
            for name, value in vars(self).items()
        }


def layer_view(source: HeadWeights, moments: LayerMoments, plan: Folding) -> LayerView:
    """The view of one layer that is written as `plan` says."""
    matrix_ZZ, shift_Z = reconstruction(plan)
    before_ZZ, mean_Z = moments.moments_ZZ, moments.mean_Z
    crossed_ZZ = before_ZZ @ matrix_ZZ.T + np.outer(mean_Z, shift_Z)
    moved_ZZ = matrix_ZZ @ np.outer(mean_Z, shift_Z)
    after_ZZ = matrix_ZZ @ before_ZZ @ matrix_ZZ.T + moved_ZZ + moved_ZZ.T
    after_ZZ += np.outer(shift_Z, shift_Z)
    width, keys = source.head_dim, len(source.key)
    every = [slice(start, start + width) for start in range(0, 2 * keys, width)]
    errors, cosines = [], []
    for part in every:
        had, got = np.trace(before_ZZ[part, part]), np.trace(after_ZZ[part, part])
        both = np.trace(crossed_ZZ[part, part])
        errors.append(float(np.sqrt(max(had - 2 * both + got, 0.0) / max(had, _TINY))))
        cosines.append(float(both / np.sqrt(max(had * got, _TINY))))
    heads = every[: source.groups]
    used = [_direction(before_ZZ[part, part]) for part in heads]
    left = [_direction(after_ZZ[part, part]) for part in heads]
    count = source.groups
    rest_YK = rest_keys(plan.basis, plan.rest_Q)
    content = np.concatenate((rest_YK @ source.key, source.value))
    return LayerView(
        key_error=tuple(errors[:count]),
        value_error=tuple(errors[count:]),
        key_cosine=tuple(cosines[:count]),
        value_cosine=tuple(cosines[count:]),
        key_angle=tuple(_angle(*pair) for pair in zip(used, left, strict=True)),
        alike=_alike(before_ZZ, heads),
        alike_after=_alike(after_ZZ, heads),
        compass=_compass(used, left),
        energy=_curve(_energies(rest_YK, moments)),
        weight_energy=_curve(np.linalg.svd(content, compute_uv=False) ** 2),
        turning=_turning(plan),
    )


def reconstruction(plan: Folding) -> tuple[Doubles, Doubles]:
    """(G, g): what comes back of z = [keys | values] is G z + g, positions aside."""
    turned, rest = _parts(plan, plan.turned_P), _parts(plan, plan.rest_Q)
    values = len(plan.latent.centre_Y) - len(rest[0])
    keys = rest[0].shape[1]
    to_y = np.block(
        [
            [rest[0], np.zeros((len(rest[0]), values))],
            [np.zeros((values, keys)), np.eye(values)],
        ]
    )
    kept_YY = plan.latent.up_YL @ plan.latent.down_LY
    shift_Y = plan.latent.centre_Y - kept_YY @ plan.latent.centre_Y
    back = np.zeros((keys + values, len(to_y)))
    back[:keys, : len(rest[0])] = rest[1].T
    back[keys:, len(rest[0]) :] = np.eye(values)
    matrix_ZZ = back @ kept_YY @ to_y
    matrix_ZZ[:keys, :keys] += turned[1].T @ turned[0]
    return matrix_ZZ, back @ shift_Y


def _energies(rest_YK: Doubles, moments: LayerMoments) -> Doubles:
    """Variances along the principal axes of what a latent may hold, keys and values scaled alike,
    the largest first; the same of every form, whatever its own axes are."""
    values = len(moments.mean_Z) // 2
    to_y = np.zeros((len(rest_YK) + values, 2 * values))
    to_y[: len(rest_YK), :values], to_y[len(rest_YK) :, values:] = rest_YK, np.eye(values)
    mean_Y = to_y @ moments.mean_Z
    whole = joint_latent(to_y @ moments.moments_ZZ @ to_y.T, mean_Y, len(rest_YK), len(mean_Y))
    return whole.energy_Y


def _parts(plan: Folding, pairs: Integers) -> tuple[Doubles, Doubles]:
    """Rows of the key basis for `pairs`, and of its inverse transposed: reals, then imaginaries."""
    queries = plan.basis.queries_C2K[pairs]
    return rest_keys(plan.basis, pairs), np.concatenate((queries[:, 0], queries[:, 1]))


def _direction(moments: Doubles) -> Doubles:
    """The direction with the most energy, its largest entry above zero."""
    found: Doubles = np.linalg.eigh(moments)[1][:, -1]
    return found * np.sign(found[np.abs(found).argmax()])


def _angle(one: Doubles, other: Doubles) -> float:
    return float(np.degrees(np.arccos(min(abs(float(one @ other)), 1.0))))


def _alike(moments: Doubles, heads: list[slice]) -> tuple[tuple[float, ...], ...]:
    sizes = [np.sqrt(max(np.trace(moments[part, part]), _TINY)) for part in heads]
    return tuple(
        tuple(
            float(np.trace(moments[one, other]) / (sizes[i] * sizes[j]))
            for j, other in enumerate(heads)
        )
        for i, one in enumerate(heads)
    )


def _compass(
    used: list[Doubles], left: list[Doubles]
) -> tuple[tuple[float, float, float, float], ...]:
    """Both directions of each head in the plane that the first ones span best."""
    axes = np.linalg.svd(np.stack(used), full_matrices=False)[2][:2]
    if len(axes) < 2:
        axes = np.concatenate((axes, np.zeros_like(axes)))
    signs = [1.0 if one @ other >= 0 else -1.0 for one, other in zip(used, left, strict=True)]
    return tuple(
        (float(a[0]), float(a[1]), float(b[0]), float(b[1]))
        for a, b in (
            (axes @ one, axes @ other * sign)
            for one, other, sign in zip(used, left, signs, strict=True)
        )
    )


def _curve(energies: NDArray[np.floating]) -> tuple[tuple[int, float], ...]:
    total = float(energies.sum()) or 1.0
    shares = np.cumsum(energies) / total
    places = np.unique(np.linspace(1, len(shares), min(_POINTS, len(shares))).astype(int))
    return tuple((int(place), float(shares[place - 1])) for place in places)


def _turning(plan: Folding) -> tuple[tuple[int, int], ...]:
    frequencies = int(plan.basis.frequency_C.max()) + 1
    return tuple(
        (int(pair) // frequencies, int(plan.basis.frequency_C[pair])) for pair in plan.turned_P
    )
