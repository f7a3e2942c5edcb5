"""The bases of keys and latents alone: exact where they must be, and best first."""

from __future__ import annotations

import numpy as np
import pytest

from mla_deploy.compress.fold import Folding, HeadWeights, folded
from mla_deploy.compress.key_basis import (
    KeyBasis,
    KeyMoments,
    balanced_basis,
    folded_basis,
    mean_rotations,
    plain_basis,
    rotation_scores,
)
from mla_deploy.compress.latent_basis import joint_latent

GROUPS, HEADS, HALF, WIDTH = 3, 6, 4, 20
VALUES = GROUPS * 2 * HALF
THETA_F = 100.0 ** (-np.arange(HALF) / HALF)


def moments(seed: int = 0) -> KeyMoments:
    rng = np.random.default_rng(seed)
    keys_XK = rng.normal(size=(400, VALUES)) @ rng.normal(size=(VALUES, VALUES))
    return KeyMoments(keys_XK.T @ keys_XK / 400, rng.uniform(0.1, 3, (HEADS, HALF)), GROUPS)


def turned(pairs_C2: np.ndarray, basis: KeyBasis, position: int) -> np.ndarray:
    """Pairs after the rotation of a position, as complex numbers."""
    return (pairs_C2[:, 0] + 1j * pairs_C2[:, 1]) * np.exp(
        1j * THETA_F[basis.frequency_C] * position
    )


@pytest.mark.parametrize("kind", ["plain", "balanced"])
def test_scores_are_the_same_in_the_new_basis(kind: str) -> None:
    """At any distance: a basis of each frequency commutes with its rotation."""
    rng = np.random.default_rng(1)
    plain = plain_basis(GROUPS, HALF)
    basis = plain if kind == "plain" else balanced_basis(moments())
    key_K, query_K = rng.normal(size=(2, VALUES))
    for here, there in ((0, 0), (7, 3), (90, 1)):
        scores = [
            (
                turned(each.keys_C2K @ key_K, each, there).conj()
                @ turned(each.queries_C2K @ query_K, each, here)
            ).real
            for each in (plain, basis)
        ]
        assert scores[1] == pytest.approx(scores[0], abs=1e-9)


def test_folded_frequencies_are_exact_only_where_nothing_turns() -> None:
    rng = np.random.default_rng(2)
    plain, basis = plain_basis(GROUPS, HALF), folded_basis(moments(), 2)
    key_K, query_K = rng.normal(size=(2, VALUES))

    def score(each: KeyBasis, here: int) -> float:
        keys = turned(each.keys_C2K @ key_K, each, 0)
        return float((keys.conj() @ turned(each.queries_C2K @ query_K, each, here)).real)

    assert score(basis, 0) == pytest.approx(score(plain, 0), abs=1e-9)
    assert abs(score(basis, 9) - score(plain, 9)) > 1e-3


def test_axes_come_strongest_first_and_slow_pairs_score_nothing() -> None:
    found, basis = moments(), balanced_basis(moments())
    energy_C = np.einsum("cpk,kl,cpl->c", basis.keys_C2K, found.keys_KK, basis.keys_C2K)
    by_axis_GF = energy_C.reshape(GROUPS, HALF)
    assert (np.diff(by_axis_GF, axis=0) <= 1e-9).all()
    scores_C = rotation_scores(basis, found, mean_rotations(np.array([1.0, 0.5, 0.1, 0.0]), 64))
    assert (scores_C[basis.frequency_C == 3] < 1e-12).all()  # what never turns need not be kept
    assert (scores_C[basis.frequency_C != 3] > 0).all()


def test_the_mean_rotation_of_a_long_context_is_small_for_a_fast_pair() -> None:
    fast, slow = np.abs(mean_rotations(np.array([1.0, 1e-6]), 4096))
    assert slow == pytest.approx(1.0, abs=1e-3)
    assert fast < 0.3


def test_a_full_latent_loses_nothing_and_a_short_one_the_least() -> None:
    rng = np.random.default_rng(3)
    y_XY = rng.normal(size=(500, 12)) @ rng.normal(size=(12, 12)) + 3.0
    both = (y_XY.T @ y_XY / 500, y_XY.mean(0))
    whole = joint_latent(*both, 5, 12)
    again = (y_XY - whole.centre_Y) @ whole.down_LY.T @ whole.up_YL.T + whole.centre_Y
    assert np.allclose(again, y_XY)
    assert whole.kept == pytest.approx(1.0)
    errors = []
    for rank in (3, 6, 9):
        basis = joint_latent(*both, 5, rank)
        again = (y_XY - basis.centre_Y) @ basis.down_LY.T @ basis.up_YL.T + basis.centre_Y
        errors.append(np.linalg.norm(again - y_XY))
    assert errors == sorted(errors, reverse=True)
    # A mean of 3 is most of the energy: without centring it takes an axis of its own.
    plain = joint_latent(*both, 5, 6, centred=False)
    again = y_XY @ plain.down_LY.T @ plain.up_YL.T
    assert np.linalg.norm(again - y_XY) > errors[1]


def attended(
    query_HE: np.ndarray, key_HTE: np.ndarray, value_HTV: np.ndarray, scale: float
) -> np.ndarray:
    scores_HT = np.einsum("he,hte->ht", query_HE, key_HTE) * scale
    weights_HT = np.exp(scores_HT - scores_HT.max(-1, keepdims=True))
    weights_HT /= weights_HT.sum(-1, keepdims=True)
    return np.einsum("ht,htv->hv", weights_HT, value_HTV).reshape(-1)


def rotated(halves: np.ndarray, theta: np.ndarray, position: int) -> np.ndarray:
    one, other = np.split(halves, 2, axis=-1)
    cos, sin = np.cos(theta * position), np.sin(theta * position)
    return np.concatenate((one * cos - other * sin, other * cos + one * sin), -1)


def test_folded_weights_attend_as_the_heads_did_when_nothing_is_cut() -> None:
    """All pairs turn, the latent has every axis of the values: attention is the source's own."""
    rng = np.random.default_rng(4)
    dim = 2 * HALF
    source = HeadWeights(
        *(rng.normal(size=shape) for shape in
          ((HEADS * dim, WIDTH), (VALUES, WIDTH), (VALUES, WIDTH), (WIDTH, HEADS * dim))),
        *(rng.normal(size=size) for size in (HEADS * dim, VALUES, VALUES, WIDTH)),
        head_dim=dim,
    )  # fmt: skip
    inputs_TD = rng.normal(size=(9, WIDTH))
    key_TK = inputs_TD @ source.key.T + source.key_bias
    value_TK = inputs_TD @ source.value.T + source.value_bias
    basis = balanced_basis(moments())
    latent = joint_latent(value_TK.T @ value_TK / 9, value_TK.mean(0), 0, VALUES)
    every = np.arange(basis.pairs)
    found = folded(source, Folding(basis, every, latent, np.ones(HALF, complex), 1.0, 2))

    def original() -> np.ndarray:
        query = (source.query @ inputs_TD[-1] + source.query_bias).reshape(HEADS, dim)
        query = rotated(query, THETA_F, 8)
        key = np.stack([rotated(k.reshape(GROUPS, dim), THETA_F, t) for t, k in enumerate(key_TK)])
        repeat = HEADS // GROUPS
        keys = np.repeat(key.swapaxes(0, 1), repeat, 0)
        values = np.repeat(value_TK.reshape(9, GROUPS, dim).swapaxes(0, 1), repeat, 0)
        return source.out @ attended(query, keys, values, 0.3) + source.out_bias

    def compressed() -> np.ndarray:
        theta = found["rope_select.weight"] @ THETA_F
        query = found["q_proj.weight"] @ inputs_TD[-1] + found["q_proj.bias"]
        query = query.reshape(HEADS, -1)
        query = np.concatenate((query[:, :2], rotated(query[:, 2:], theta, 8)), -1)
        row = inputs_TD @ found["kv_a_proj_with_mqa.weight"].T + found["kv_a_proj_with_mqa.bias"]
        rope = np.stack([rotated(k, theta, t) for t, k in enumerate(row[:, VALUES:])])
        both = (row[:, :VALUES] @ found["kv_b_proj.weight"].T).reshape(9, HEADS, -1).swapaxes(0, 1)
        keys = np.concatenate((both[..., :2], np.broadcast_to(rope, (HEADS, *rope.shape))), -1)
        out = attended(query, keys, both[..., 2:], 0.3)
        return found["o_proj.weight"] @ out + found["o_proj.bias"]

    assert np.allclose(compressed(), original(), atol=1e-9)
