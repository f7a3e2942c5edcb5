"""The views say what the weights do: checked against reconstruction of single tokens."""

from __future__ import annotations

import numpy as np
import pytest

from mla_deploy.compress.fold import Folding, HeadWeights, rest_keys
from mla_deploy.compress.key_basis import balanced_basis
from mla_deploy.compress.latent_basis import joint_latent
from mla_deploy.compress.stream import LayerMoments
from mla_deploy.compress.views import layer_view, reconstruction

GROUPS, HEADS, DIM, WIDTH, TOKENS = 2, 4, 8, 24, 600
VALUES = GROUPS * DIM


def made(rank: int, turning: int) -> tuple[HeadWeights, LayerMoments, Folding, np.ndarray]:
    rng = np.random.default_rng(5)
    shapes = ((HEADS * DIM, WIDTH), (VALUES, WIDTH), (VALUES, WIDTH), (WIDTH, HEADS * DIM))
    q, k, v, o = (rng.normal(size=shape) for shape in shapes)
    zeros = [np.zeros(len(each)) for each in (q, k, v, o)]
    source = HeadWeights(q, k, v, o, *zeros, DIM)
    inputs_XD = rng.normal(size=(TOKENS, WIDTH)) * np.linspace(0.1, 2, WIDTH) + 0.3
    z_XZ = np.concatenate((inputs_XD @ k.T, inputs_XD @ v.T), 1)
    queries = (inputs_XD @ q.T).reshape(TOKENS, HEADS, 2, DIM // 2)
    moments = LayerMoments(
        z_XZ.mean(0), z_XZ.T @ z_XZ / TOKENS, (queries**2).sum(2).mean(0), TOKENS
    )
    basis = balanced_basis(moments.keys(GROUPS))
    turned = np.arange(turning)
    rest = rest_keys(basis, np.setdiff1d(np.arange(basis.pairs), turned))
    to_y = np.zeros((len(rest) + VALUES, 2 * VALUES))
    to_y[: len(rest), :VALUES], to_y[len(rest) :, VALUES:] = rest, np.eye(VALUES)
    latent = joint_latent(
        to_y @ moments.moments_ZZ @ to_y.T, to_y @ moments.mean_Z, len(rest), rank
    )
    plan = Folding(basis, turned, latent, np.ones(DIM // 2, complex), 1.0, DIM)
    return source, moments, plan, z_XZ


@pytest.mark.parametrize(("rank", "turning"), [(26, 3), (12, 2), (8, 0)])
def test_moments_tell_what_tokens_do(rank: int, turning: int) -> None:
    source, moments, plan, z_XZ = made(rank, turning)
    view = layer_view(source, moments, plan)
    matrix, shift = reconstruction(plan)
    back_XZ = z_XZ @ matrix.T + shift
    for head in range(GROUPS):
        for offset, errors, cosines in (
            (0, view.key_error, view.key_cosine),
            (VALUES, view.value_error, view.value_cosine),
        ):
            part = slice(offset + head * DIM, offset + (head + 1) * DIM)
            had, got = z_XZ[:, part], back_XZ[:, part]
            error = np.linalg.norm(had - got) / np.linalg.norm(had)
            cosine = (had * got).sum() / np.linalg.norm(had) / np.linalg.norm(got)
            assert errors[head] == pytest.approx(error, abs=1e-6)
            assert cosines[head] == pytest.approx(cosine, abs=1e-9)


def test_a_whole_latent_keeps_every_direction() -> None:
    source, moments, plan, _ = made(2 * VALUES - 6, 3)
    view = layer_view(source, moments, plan)
    assert max(*view.key_error, *view.value_error) < 1e-6
    assert min(*view.key_cosine, *view.value_cosine) > 1 - 1e-9
    assert max(view.key_angle) < 1e-4
    assert view.alike == pytest.approx(np.array(view.alike_after), abs=1e-9)


def test_less_kept_is_worse_and_curves_rise_to_all() -> None:
    few, many = (layer_view(*made(rank, 2)[:3]) for rank in (8, 20))
    assert max(few.value_error) > max(many.value_error)
    assert min(few.key_cosine) < min(many.key_cosine)
    for curve in (few.energy, few.weight_energy):
        shares = [share for _, share in curve]
        assert shares == sorted(shares) and shares[-1] == pytest.approx(1.0)
    assert len(few.turning) == 2
