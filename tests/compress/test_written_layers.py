"""One layer in a new form: a basis for few bits changes nothing else, a fit brings it closer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mla_deploy.compress.even_basis import evened
from mla_deploy.compress.heads_model import HeadsModel
from mla_deploy.compress.latent_layers import LatentLayers
from mla_deploy.compress.plan import Form, form_of
from mla_deploy.compress.stream import AttendedRows, MomentsOf, Rows
from mla_deploy.compress.views import reconstruction
from mla_deploy.compress.weight_files import open_weight_files
from tests.compress.llamas import write_llama

KEYS = 32


@pytest.fixture(scope="module", params=["Llama", "Qwen2"])
def source(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HeadsModel]:
    folder = write_llama(tmp_path_factory.mktemp("layers") / "source", request.param)
    with open_weight_files(folder) as files:
        yield HeadsModel(files)


class Learnt:
    """The first layer, with statistics of random rows, and hidden states of others."""

    def __init__(self, source: HeadsModel) -> None:
        rng = np.random.default_rng(3)
        # As text has them: few tokens often. All alike, nothing would tell of anything else.
        rows, others = (rng.zipf(1.3, (2, 16, 128)) % 2048).tolist()
        self.source, self.layer = source, source.layer(0)
        self.weights = source.attention(self.layer)
        self.others, self.seen = Rows(others, source.rotary), Rows(rows, source.rotary)
        calibration = Rows(rows, source.rotary)
        embed = source.trunk()[0]
        for each in (self.others, self.seen, calibration):
            each.embed(embed)
        collected = MomentsOf(self.weights, 0)
        with AttendedRows(self.layer, calibration) as self.attended:
            calibration.through(self.layer, collected)
        self.moments = collected.done()

    def error(self, form: Form, rows: Rows | None = None, *, fitted: bool = False) -> float:
        """Of the layer in `form` on `rows`, others than it learnt, beside what attention adds."""
        rows = self.others if rows is None else rows
        layers = LatentLayers(self.source, form, "fp32")
        plan = layers.folding(0, self.weights, self.moments)
        attended = self.attended if fitted else None
        made = layers.made(0, self.layer, plan, self.weights, attended=attended)
        found = rows.copied(16)
        with AttendedRows(made, found) as ours:
            found.through(made, cached=layers.rounding)
        wanted = rows.copied(16)
        with AttendedRows(self.layer, wanted) as theirs:
            wanted.through(self.layer)
        pairs = list(zip(ours.pairs(), theirs.pairs(), strict=True))
        lost = sum(float((a[1] - b[1]).square().sum()) for a, b in pairs)
        return (lost / sum(float(b[1].square().sum()) for _, b in pairs)) ** 0.5


@pytest.fixture(scope="module")
def learnt(source: HeadsModel) -> Learnt:
    return Learnt(source)


def form(learnt: Learnt, rank: int, rope: int, cache: str | None = None) -> Form:
    return form_of(learnt.source.facts, [(rank, rope)] * 2, 256, cache)


@pytest.mark.parametrize(("rank", "rope"), [(32, 32), (40, 12)])
def test_a_basis_for_few_bits_computes_the_same(learnt: Learnt, rank: int, rope: int) -> None:
    plain = form(learnt, rank, rope)
    stored = Form(tuple(replace(each, is_stored=True) for each in plain.layers))
    layers = [LatentLayers(learnt.source, each, "fp32") for each in (plain, stored)]
    plans = [each.folding(0, learnt.weights, learnt.moments) for each in layers]
    assert not np.allclose(plans[0].latent.down_LY, plans[1].latent.down_LY)
    for one, other in zip(*map(reconstruction, plans), strict=True):
        assert np.allclose(one, other, atol=1e-9)
    assert learnt.error(stored) == pytest.approx(learnt.error(plain), abs=1e-5)


def test_channels_are_alike_in_it(learnt: Learnt) -> None:
    plan = LatentLayers(learnt.source, form(learnt, 40, 12), "fp32").folding(
        0, learnt.weights, learnt.moments
    )
    spread = []
    for each in (plan, evened(plan, learnt.weights, learnt.moments)):
        down_LZ = reconstruction(replace(each, latent=replace(
            each.latent, up_YL=np.zeros_like(each.latent.up_YL))))[0]  # fmt: skip
        assert down_LZ.shape == (2 * KEYS, 2 * KEYS)
        rest = np.concatenate((each.basis.keys_C2K[each.rest_Q, 0],
                               each.basis.keys_C2K[each.rest_Q, 1]))  # fmt: skip
        to_y = np.block([[rest, np.zeros((len(rest), KEYS))],
                         [np.zeros((KEYS, KEYS)), np.eye(KEYS)]])  # fmt: skip
        rows = each.latent.down_LY @ to_y
        centred = learnt.moments.moments_ZZ - np.outer(learnt.moments.mean_Z, learnt.moments.mean_Z)
        deviations = np.sqrt(np.diag(rows @ centred @ rows.T))
        spread.append(deviations.max() / deviations.min())
    assert spread[1] < 2 < spread[0]


def test_four_bits_lose_less_in_it(learnt: Learnt) -> None:
    stored = form(learnt, 40, 12, "int4")
    plain = Form(tuple(replace(each, is_stored=False) for each in stored.layers), "int4")
    unstored = form(learnt, 40, 12)
    assert learnt.error(unstored) < learnt.error(stored) < learnt.error(plain)


def test_a_fit_brings_what_it_saw_closer_and_nothing_else_far_away(learnt: Learnt) -> None:
    """A random model has little to learn from: a trained one gains, `bench/compress.py` shows."""
    cut = form(learnt, 20, 12)
    assert cut.is_fitted
    seen, others = learnt.seen, learnt.others
    assert learnt.error(cut, seen, fitted=True) < 0.98 * learnt.error(cut, seen)
    assert learnt.error(cut, others, fitted=True) < 1.02 * learnt.error(cut, others)


def test_a_fit_leaves_alone_what_loses_nothing(learnt: Learnt) -> None:
    whole = form(learnt, 32, 32)
    assert not whole.is_fitted
    forced = Form(tuple(replace(each, is_fitted=True) for each in whole.layers))
    assert learnt.error(forced, fitted=True) < 1e-5


def test_a_fit_is_least_squares(learnt: Learnt) -> None:
    """Against numpy's, at rows of the calibration itself."""
    layers = LatentLayers(learnt.source, form(learnt, 20, 12), "fp32")
    plan = layers.folding(0, learnt.weights, learnt.moments)
    plain = copy.deepcopy(layers.made(0, learnt.layer, plan, learnt.weights))
    fitted = layers.made(0, learnt.layer, plan, learnt.weights, attended=learnt.attended)
    seen: list[Any] = []
    hook = plain.self_attn.o_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    wanted = []
    with torch.no_grad():
        for inputs, given in learnt.attended.pairs():
            plain.self_attn(hidden_states=inputs, position_embeddings=learnt.attended.angles)
            wanted.append(given.reshape(-1, given.shape[-1]))
    hook.remove()
    a_XY = torch.cat([each.reshape(-1, each.shape[-1]) for each in seen]).double().numpy()
    y_XD = torch.cat(wanted).double().numpy()
    old = plain.self_attn.o_proj.weight.double().numpy()
    centred, mean = a_XY - a_XY.mean(0), a_XY.mean(0)
    damping = np.sqrt(1e-2 * (centred**2).mean() * len(a_XY))
    left = y_XD - y_XD.mean(0) - centred @ old.T
    padded = np.concatenate((centred, damping * np.eye(len(mean))))
    nothing = np.zeros((len(mean), left.shape[1]))
    more = np.linalg.lstsq(padded, np.concatenate((left, nothing)), rcond=None)[0].T
    found = fitted.self_attn.o_proj
    assert np.allclose(found.weight.double().numpy(), old + more, atol=1e-4 * np.abs(old).max())
    bias = y_XD.mean(0) - (old + more) @ mean
    assert np.allclose(found.bias.double().numpy(), bias, atol=1e-3 * np.abs(y_XD).max())
