"""Losses are those of transformers' own cache with rows stored so; bytes are the store's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mla_deploy.checkpoint import open_checkpoint
from mla_deploy.compress.native.bases import BASES, FOLDED, HADAMARD, PLAIN
from mla_deploy.compress.native.forms import BOTH, CUT, STORE, WHOLE, Form, forms_for
from mla_deploy.compress.native.measure import Measured, Texts
from mla_deploy.compress.native.sites import Site, sites_of
from mla_deploy.errors import InputError
from mla_deploy.latent_store import STORES
from mla_deploy.source.cache import CacheRounding, cache_keyword, source_cache
from mla_deploy.source.latent_rotation import rotate_module
from mla_deploy.source.layerwise import LayerwiseModel
from mla_deploy.source.model import empty_model, module_from_checkpoint, source_weights
from tests.families import FAMILIES, write_family

LENGTH = 24
SITE = Site("a", "a", 4, 8, 8, 512, 64, 48, owns=True, slides=False, folds=None)
FORMS = tuple(
    Form(STORE, store=STORES[store], basis=basis)
    for store in ("int8", "int4", "fp8", "int8-all")
    for basis in (PLAIN, HADAMARD)
)


def texts() -> Texts:
    rng = np.random.default_rng(7)
    drawn = rng.integers(0, 96, (6, LENGTH))
    rows = [tuple(map(int, row)) for row in drawn]
    return Texts(rows[:4], rows[4:], "random")


def measured(checkpoint: Any, forms: tuple[Form, ...]) -> tuple[Any, Any]:
    weights = source_weights(checkpoint)
    model = LayerwiseModel(checkpoint.config, weights.read_parameter)
    sites = sites_of(empty_model(checkpoint.config, FakeTensorMode()), list(model.layers))
    seen: list[Any] = []
    run = Measured(
        model, sites, forms, checkpoint.config.vocab_size, seen=lambda *a: seen.append(a)
    )
    return run.run(texts(), None), seen


def by_cache(model: Any, form: CacheRounding, row: tuple[int, ...]) -> torch.Tensor:
    """Log probabilities of `model` with a cache that rounds what it is given."""
    cache = source_cache(model.config, form)
    with torch.no_grad():
        found = model(input_ids=torch.tensor([row]), **{cache_keyword(model): cache}).logits
    return found[0].double().log_softmax(-1)


@pytest.mark.parametrize("family", ["youtu", "minicpm3"])
def test_losses_are_those_of_a_cache_that_stores_so(family: str, tmp_path: Path) -> None:
    with open_checkpoint(write_family(tmp_path / "m", family)) as checkpoint:
        losses, _ = measured(checkpoint, FORMS)
        model = module_from_checkpoint(checkpoint)
        plain = [by_cache(model, CacheRounding(), row) for row in texts().judged]
        for basis in (PLAIN, HADAMARD):
            if basis == HADAMARD:
                rotate_module(model)
            for form in (each for each in FORMS if each.basis == basis):
                kls = []
                for wanted, row in zip(plain, texts().judged, strict=True):
                    given = by_cache(model, CacheRounding("fp16", form.store), row)
                    kls.append((wanted.exp() * (wanted - given)).sum(-1)[:-1])
                assert losses[form].mean_kl == pytest.approx(
                    float(torch.cat(kls).mean()), rel=0.05, abs=1e-9
                ), form.name


@pytest.mark.parametrize("family", sorted(n for n in FAMILIES if "-" not in n))
def test_every_family_has_its_sites(family: str, tmp_path: Path) -> None:
    """Stored in 16 bits a latent loses a rounding; cut to a quarter, much more."""
    forms = (Form(WHOLE), Form(CUT, forms_for([SITE])[6].share))
    with open_checkpoint(write_family(tmp_path / "m", family)) as checkpoint:
        losses, seen = measured(checkpoint, forms)
        kept = [site for site, *_ in seen]
        # What config.json says of the cache, and what was found in the class.
        assert forms[0].token_bytes(kept) == checkpoint.config.cache_bytes_per_token(2)
        assert all((moments is not None) == site.owns for site, _, moments, _ in seen)
        assert {moments.tokens for _, _, moments, _ in seen if moments} == {4 * LENGTH}
        assert losses[forms[1]].mean_kl > 3 * losses[forms[0]].mean_kl
        if family == "mistral_large4":
            assert [site.owns for site in kept] == [True, False, True, False]
        if family.startswith("dots3_note"):
            assert sum(site.slides for site in kept) == 2


def test_bytes_are_those_of_the_store() -> None:
    rope = 2 * SITE.rope
    assert Form(WHOLE).token_bytes([SITE, SITE]) == 2 * (2 * 512 + rope)
    named = {form.name: form for form in forms_for([SITE])}
    assert named["int8"].token_bytes([SITE]) == 512 + 4 + rope
    assert named["int8-tile hadamard"].token_bytes([SITE]) == 512 + 16 + rope
    assert named["int4"].token_bytes([SITE]) == 256 + 8 + rope
    assert named["fp8"].token_bytes([SITE]) == 512 + 16 + rope
    assert named["int8-all"].token_bytes([SITE]) == 512 + 2 + 64 + 2 * 2
    assert named["1/2 rank"].token_bytes([SITE]) == 512 + rope
    assert named["1/2 rank int8"].token_bytes([SITE]) == 256 + 4 + rope
    still = [replace(SITE, owns=False), replace(SITE, slides=True)]
    assert all(form.token_bytes(still) == 0 for form in named.values())


def test_forms_that_make_no_difference_are_left_out() -> None:
    small, odd = replace(SITE, rank=64), replace(SITE, rank=33)
    assert not any(f.store is STORES["int8-tile"] for f in forms_for([small]))
    assert not any(f.store is STORES["int4"] for f in forms_for([odd]))
    assert len({form.name for form in forms_for([SITE])}) == len(forms_for([SITE]))
    assert {form.basis for form in forms_for([SITE]) if form.kind == STORE} == set(BASES)
    assert all(form.rank(odd) % 2 == 0 for form in forms_for([odd]) if form.kind in (CUT, BOTH))


def test_a_model_without_a_latent_is_refused() -> None:
    with pytest.raises(InputError, match="CMP-NATIVE"):
        sites_of(torch.nn.Sequential(torch.nn.Linear(2, 2)), ["0"])


@pytest.mark.parametrize("basis", FOLDED)
def test_a_basis_that_folds_changes_no_logit(basis: str, tmp_path: Path) -> None:
    """What docs/compress.md says of it: kv_a, the norm's weight and kv_b take it up."""
    with open_checkpoint(write_family(tmp_path / "m", "deepseek_v3")) as checkpoint:
        _, seen = measured(checkpoint, (Form(WHOLE),))
        model = module_from_checkpoint(checkpoint)
        ids = torch.tensor(texts().judged)
        wanted = model(input_ids=ids, use_cache=False).logits
        for site, weights, _, bases in seen:
            found = bases.named(basis)
            if found.down_KL is None or found.up_LK is None:
                continue
            module = model.get_submodule(site.path)
            gain_L = torch.from_numpy(weights.gain_L).float()
            # down = diag(size) Q diag(1 / gain), with Q orthogonal or, by channel, the identity.
            inner_LL = found.down_KL * gain_L
            size_L = inner_LL.norm(dim=1)
            turn_LL = inner_LL / size_L[:, None]
            assert torch.allclose(turn_LL @ turn_LL.T, torch.eye(site.rank), atol=1e-3)
            down = module.kv_a_proj_with_mqa.weight
            down[: site.rank] = turn_LL @ down[: site.rank]
            module.kv_a_layernorm.weight.copy_(size_L)
            module.kv_b_proj.weight.copy_(module.kv_b_proj.weight @ found.up_LK)
        given = model(input_ids=ids, use_cache=False).logits
        assert torch.allclose(given, wanted, atol=2e-3 * float(wanted.abs().max()))
        assert basis == PLAIN or not torch.equal(given, wanted)
