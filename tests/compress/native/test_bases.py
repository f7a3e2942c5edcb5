"""Bases undo themselves, even out what they say they do, and the matched one loses least."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mla_deploy.compress.native.bases import BASES, Bases
from mla_deploy.compress.native.moments import (
    LatentMoments,
    MomentsOf,
    damped,
    effective_rank,
    power,
    reader_metric,
)
from mla_deploy.compress.native.sites import Site, SiteWeights
from mla_deploy.errors import InputError
from mla_deploy.source.latent_rotation import rotated

RANK, HEADS, NOPE, VALUE, WIDTH = 16, 3, 6, 4, 20
SITE = Site("a", "a", HEADS, NOPE, VALUE, RANK, 8, WIDTH, owns=True, slides=False, folds=None)


@pytest.fixture
def made() -> Any:
    rng = np.random.default_rng(3)
    weights = SiteWeights(
        rng.normal(size=(HEADS, NOPE, RANK)),
        rng.normal(size=(HEADS, VALUE, RANK)),
        rng.normal(size=(HEADS, WIDTH, VALUE)),
        rng.uniform(0.2, 3, RANK),
    )
    mixed = rng.normal(size=(RANK, RANK)) * np.geomspace(1, 0.05, RANK)
    latent_XL = rng.normal(size=(500, RANK)) @ mixed.T
    query_HXN = rng.normal(size=(HEADS, 500, NOPE)) * np.linspace(0.2, 2, NOPE)
    collected = MomentsOf(SITE)
    collected.latent(torch.from_numpy(latent_XL)[None, None])
    collected.query(torch.from_numpy(query_HXN)[None])
    return weights, collected.done(), latent_XL, query_HXN


def bases_of(made: Any) -> Bases:
    return Bases(made[1], reader_metric(*made[:2]), made[0].gain_L)


def test_moments_are_means(made: Any) -> None:
    _, moments, latent_XL, query_HXN = made
    assert moments.tokens == 500
    assert np.allclose(moments.second_LL, latent_XL.T @ latent_XL / 500)
    assert np.allclose(moments.queries_HNN[1], query_HXN[1].T @ query_HXN[1] / 500)


def test_the_metric_is_what_an_error_costs(made: Any) -> None:
    """Token by token: scores moved by an error of the latent, and outputs; alike in the sum."""
    weights, moments, latent_XL, query_HXN = made
    metric_LL = reader_metric(weights, moments)
    scores = np.einsum("hxn,hnl,yl->hxy", query_HXN, weights.w_uk_HNL, latent_XL)
    keys = (scores**2).sum() / 500**2
    outs = np.einsum("hdv,hvl,yl->hyd", weights.w_o_HDV, weights.w_uv_HVL, latent_XL)
    values = (outs**2).sum() / 500
    error_L = np.random.default_rng(5).normal(size=RANK)
    moved = np.einsum("hxn,hnl,l->hx", query_HXN, weights.w_uk_HNL, error_L)
    pushed = np.einsum("hdv,hvl,l->hd", weights.w_o_HDV, weights.w_uv_HVL, error_L)
    wanted = (moved**2).sum() / 500 / keys + (pushed**2).sum() / values
    assert error_L @ metric_LL @ error_L == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("name", BASES)
def test_a_basis_undoes_itself(made: Any, name: str) -> None:
    basis = bases_of(made).named(name)
    if basis.down_KL is None or basis.up_LK is None:
        assert name == "plain"
        return
    assert torch.allclose(basis.up_LK @ basis.down_KL, torch.eye(RANK), atol=1e-4)


def test_what_each_basis_evens_out(made: Any) -> None:
    weights, _, latent_XL, _ = made
    bases = bases_of(made)
    latent = torch.from_numpy(latent_XL).float()

    def second(name: str) -> torch.Tensor:
        down = bases.named(name).down_KL
        assert down is not None
        return (latent @ down.T).T @ (latent @ down.T) / len(latent)

    assert torch.allclose(second("channel").diag(), torch.ones(RANK), atol=1e-3)
    assert torch.allclose(second("pca"), torch.eye(RANK), atol=1e-2)
    turned = rotated(latent / torch.from_numpy(weights.gain_L).float())
    found = bases.named("hadamard").down_KL
    assert found is not None
    assert torch.allclose(latent @ found.T, turned, atol=1e-4)


def test_matched_is_the_least_loss_for_even_steps(made: Any) -> None:
    """tr(A C) tr(A^-1 M): the size of a step squared, and what it costs (A = down^T down)."""
    bases = bases_of(made)

    def cost(matrix_LL: Any) -> float:
        inverse_LL = np.linalg.inv(matrix_LL)
        asked = np.trace(inverse_LL @ bases.metric_LL)
        return float(np.trace(matrix_LL @ bases.second_LL) * asked)

    down = bases.named("matched").down_KL
    assert down is not None
    matched = cost(down.double().numpy().T @ down.double().numpy())
    least = np.trace(power(power(bases.second_LL, 0.5) @ bases.metric_LL
                           @ power(bases.second_LL, 0.5), 0.5)) ** 2  # fmt: skip
    assert matched == pytest.approx(float(least), rel=1e-3)
    for other in (np.eye(RANK), np.linalg.inv(bases.second_LL), bases.metric_LL):
        assert matched < cost(other)


def test_a_cut_keeps_what_readers_need(made: Any) -> None:
    bases = bases_of(made)

    def lost(down: Any, up: Any) -> float:
        rest = np.eye(RANK) - np.asarray(up, float) @ np.asarray(down, float)
        return float(np.trace(rest.T @ bases.metric_LL @ rest @ bases.second_LL))

    for rank in (4, 8, 12):
        cut, mixed = bases.cut(rank), bases.cut(rank, mixed=True)
        own = lost(cut.down_KL, cut.up_LK)
        assert own == pytest.approx(float(bases.energies_L[rank:].sum()), rel=1e-3)
        assert lost(mixed.down_KL, mixed.up_LK) == pytest.approx(own, rel=1e-3)
        plain = np.linalg.eigh(bases.second_LL)[1][:, ::-1][:, :rank]
        assert own < lost(plain.T, plain)
    whole = bases.cut(RANK)
    assert lost(whole.down_KL, whole.up_LK) < 1e-9 * bases.energies_L.sum()


def test_effective_rank_counts_directions() -> None:
    assert effective_rank(np.array([3.0, 3.0, 3.0, 0.0])) == pytest.approx(3.0)
    assert effective_rank(np.array([5.0, 0.0])) == pytest.approx(1.0)


def test_a_channel_that_never_moves_divides_nothing() -> None:
    second_LL = np.diag([1.0, 0.0, 2.0, 1.0])
    moments = LatentMoments(second_LL, np.zeros((1, 1, 1)), 4)
    bases = Bases(moments, damped(np.zeros((4, 4))), np.array([1.0, 0.0, 1.0, 1.0]))
    for name in BASES:
        basis = bases.named(name)
        for matrix in (basis.down_KL, basis.up_LK):
            assert matrix is None or bool(matrix.isfinite().all())


@pytest.mark.parametrize("what", ["latent", "query"])
def test_what_is_not_finite_is_refused(what: str) -> None:
    values = torch.full((1, HEADS if what == "query" else 1, 2, RANK), torch.inf)
    with pytest.raises(InputError, match="CMP-NONFINITE"):
        getattr(MomentsOf(SITE), what)(values)
