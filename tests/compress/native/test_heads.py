"""How heads lie to each other, from moments, is what token by token comes out."""

from __future__ import annotations

import numpy as np
import pytest

from mla_deploy.compress.native.heads import alike, head_cosines

HEADS, WIDE, RANK, TOKENS = 4, 5, 12, 400


def made() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    w_HNL = rng.normal(size=(HEADS, WIDE, RANK))
    w_HNL[2] = -w_HNL[0] + 0.1 * w_HNL[2]
    turn = np.linalg.qr(rng.normal(size=(WIDE, WIDE)))[0]
    w_HNL[3] = turn @ w_HNL[1]
    return w_HNL, rng.normal(size=(TOKENS, RANK)) * np.geomspace(2, 0.2, RANK)


def test_cosines_and_shared_directions() -> None:
    w_HNL, latent_XL = made()
    found = alike(w_HNL, latent_XL.T @ latent_XL / TOKENS)
    read_HXN = np.einsum("hnl,xl->hxn", w_HNL, latent_XL)
    for one in range(HEADS):
        for other in range(HEADS):
            a, b = read_HXN[one], read_HXN[other]
            cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
            norms = np.linalg.norm(a.T @ a), np.linalg.norm(b.T @ b)
            shared = np.linalg.norm(a.T @ b) ** 2 / np.prod(norms)
            assert found.cosine[one][other] == pytest.approx(cosine, abs=1e-4)
            assert found.shared[one][other] == pytest.approx(shared, abs=1e-4)
    assert found.pair == (0, 2) and found.cosine_most < -0.9
    # Heads 1 and 3 read the same directions and write them in other axes.
    assert found.shared[1][3] == pytest.approx(1.0, abs=1e-4)
    assert abs(found.cosine[1][3]) < 0.9


def test_many_heads_share_cells() -> None:
    rng = np.random.default_rng(2)
    found = alike(rng.normal(size=(70, 2, 6)), np.eye(6))
    assert found.group == 3
    assert len(found.cosine) == len(found.cosine[0]) == 24


def test_one_head_has_nobody_to_be_like() -> None:
    found = alike(np.ones((1, 2, 3)), np.eye(3))
    assert found.cosine_mean == found.cosine_most == found.shared_mean == 0.0


def test_what_a_head_has_left() -> None:
    w_HNL, latent_XL = made()
    kept_LL = np.diag([1.0] * 6 + [0.0] * 6)
    found = head_cosines(w_HNL, latent_XL.T @ latent_XL / TOKENS, kept_LL)
    for head, cosine in enumerate(found):
        had, got = latent_XL @ w_HNL[head].T, latent_XL @ kept_LL.T @ w_HNL[head].T
        wanted = (had * got).sum() / np.linalg.norm(had) / np.linalg.norm(got)
        assert cosine == pytest.approx(wanted, abs=1e-9)
