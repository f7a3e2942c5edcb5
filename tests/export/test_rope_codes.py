"""Rope keys in codes beside the latent's, end to end: a rope key of one tile and of several, held
against the source that rounds the same rows; the cache dtype that a checkpoint asks for itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mla_deploy
from mla_deploy import compress, plan
from mla_deploy.bundle import Bundle
from mla_deploy.checkpoint import open_checkpoint
from mla_deploy.cli.bundle_sheets import stored_words
from mla_deploy.errors import InputError
from mla_deploy.export.requantize import quantize
from mla_deploy.latent_store import STORES
from mla_deploy.rewrite import lower_integer
from mla_deploy.runtime import OnnxRunner
from mla_deploy.runtime.sessions import GraphSessions
from mla_deploy.runtime.torch_runner import TorchRunner
from tests.compress.llamas import fields_of, write_llama
from tests.export.shared_runner import GRAPHS, ids, open_poisoned
from tests.export.test_cache_dtype import ROUNDED, differences, relative, stepwise

TRAINED = Path(__file__).parents[2] / "models/tiny-deepseek-v3"
KEEPS_ROPE = [name for name, store in STORES.items() if store.rope_key is not None]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In exact MLA form: latent and rope key of 2 x 32 values each, two tiles of a rope key."""
    folder = tmp_path_factory.mktemp("llama")
    source = write_llama(folder / "source", head_dim=32, attention_bias=True)
    return compress(source, folder / "out").path


@pytest.fixture(params=["trained", "llama"])
def checkpoint(request: pytest.FixtureRequest, llama: Path) -> Path:
    return TRAINED if request.param == "trained" else llama


@pytest.mark.parametrize("name", KEEPS_ROPE)
def test_equal_to_the_source_that_rounds_alike(
    name: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged rows and steps of both graphs, bytes multiplied, NaN in every stale slot; then bytes
    by the config alone."""
    monkeypatch.setattr(lower_integer, "_LEAST_TOKENS", 1)
    bundle = mla_deploy.export(checkpoint, tmp_path / "bundle", cache_dtype=name)
    sessions = GraphSessions(bundle, threads=1)
    with open_checkpoint(checkpoint) as opened:
        source = TorchRunner(opened, 3)
        source.store_as("fp32", cache_dtype=name)
        for graph in GRAPHS:
            runner = open_poisoned(sessions, 3, graph)
            assert max(differences(runner, source, stepwise(3))) < ROUNDED[name]
            for layer in runner.cache_layers:
                wanted = source.cached_rows(layer, 1)
                assert relative(runner.cached_rows(layer, 1), wanted) < ROUNDED[name]
        source.store_as("fp32", cache_dtype=name.removesuffix("-all"))
        assert max(differences(open_poisoned(sessions, 3), source, stepwise(3))) > 1e-4
        _check_bytes(bundle, opened.config, name)


def _check_bytes(bundle: Bundle, config: Any, name: str) -> None:
    row = STORES[name].row_bytes(config.kv_lora_rank, config.qk_rope_head_dim)
    wanted = config.num_layers * row
    assert bundle.manifest["cache"]["bytes_per_token"] == wanted
    assert bundle.manifest["cache"]["store"]["rope_key"]["bits"] == 8
    assert OnnxRunner(GraphSessions(bundle, threads=1), batch=2, capacity=50).cache_bytes == (
        2 * 50 * wanted
    )
    planned = plan(bundle.path, cache=name, device="cpu", batch=2, context=50)
    assert planned.devices[0].memory.cache_bytes == 2 * 50 * wanted


@pytest.mark.parametrize("name", KEEPS_ROPE)
def test_rows_go_back_and_begin_anew(name: str, llama: Path, tmp_path: Path) -> None:
    """A rejected draft, then a row that is reset and refilled: as if neither had been."""
    bundle = mla_deploy.export(llama, tmp_path / "bundle", cache_dtype=name)
    sessions = GraphSessions(bundle, threads=1)
    runner, plain = open_poisoned(sessions, 2), open_poisoned(sessions, 2)
    for each in (runner, plain):
        each.prefill([ids(9), ids(5, 1)])
    runner.verify([ids(4, 2), ids(3, 3)])
    runner.rollback([9, 5])
    for seed in (4, 5):
        np.testing.assert_array_equal(runner.decode(ids(2, seed)), plain.decode(ids(2, seed)))
    runner.reset([0])
    again = open_poisoned(sessions, 2)
    found, wanted = (each.prefill([ids(7, 6), None])[0] for each in (runner, again))
    assert relative(found, wanted) < 1e-5


def test_a_bundle_is_stored_anew(llama: Path, tmp_path: Path) -> None:
    made = mla_deploy.export(llama, tmp_path / "made", cache_dtype="int8-all")
    plain = mla_deploy.export(llama, tmp_path / "plain")
    found = quantize(plain, tmp_path / "out", cache_dtype="int8-all")
    assert found.files["decode.onnx"].sha256 == made.files["decode.onnx"].sha256
    assert mla_deploy.validate(found, source=llama, threads=1).passed


def asking(checkpoint: Path, folder: Path, word: object) -> Path:
    """`checkpoint` with `latent_cache_dtype` in its config."""
    shutil.copytree(checkpoint, folder)
    fields = {**fields_of(checkpoint), "latent_cache_dtype": word}
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder


def test_a_checkpoint_asks_for_its_cache_and_an_option_wins(llama: Path, tmp_path: Path) -> None:
    folder = asking(llama, tmp_path / "checkpoint", "int8-all")
    bundle = mla_deploy.export(folder, tmp_path / "own")
    assert bundle.manifest["cache"]["dtype"] == "int8-all"
    assert bundle.manifest["cache"]["dtype_from"] == "config.json"
    assert stored_words(bundle) == "fp32, cache int8-all as config.json asks"
    assert mla_deploy.validate(bundle, source=folder, threads=1).passed
    (row,) = plan(folder, device="cpu").devices
    assert row.cache_dtype == "int8-all"
    (row,) = plan(folder, device="cpu", cache="fp16").devices
    assert row.cache_dtype == "fp16"
    told = mla_deploy.export(folder, tmp_path / "told", cache_dtype="fp32")
    assert told.manifest["cache"]["dtype"] == "fp32"
    assert "dtype_from" not in told.manifest["cache"]
    assert stored_words(told) == "fp32"
    again = quantize(told, tmp_path / "again", weights="int8").manifest["cache"]
    assert again["dtype"] == "fp32"
    kept = quantize(bundle, tmp_path / "kept", weights="int8").manifest["cache"]
    assert (kept["dtype"], kept["dtype_from"]) == ("int8-all", "config.json")


def test_a_target_without_codes_says_where_they_were_asked_for(llama: Path, tmp_path: Path) -> None:
    folder = asking(llama, tmp_path / "checkpoint", "int4-all")
    with pytest.raises(InputError, match="TARGET-FORM") as refusal:
        mla_deploy.export(folder, tmp_path / "bundle", target="rtx-40")
    assert "latent_cache_dtype" in str(refusal.value.hint)
    assert "--cache-dtype fp16" in str(refusal.value.hint)
    made = mla_deploy.export(folder, tmp_path / "bundle", target="rtx-40", cache_dtype="fp16")
    assert made.manifest["cache"]["dtype"] == "fp16"


@pytest.mark.parametrize(
    ("word", "code"), [("int2", "CFG-RANGE"), (8, "CFG-TYPE"), ([], "CFG-TYPE")]
)
def test_a_cache_that_is_not_known_is_refused(
    word: object, code: str, llama: Path, tmp_path: Path
) -> None:
    folder = asking(llama, tmp_path / "checkpoint", word)
    with pytest.raises(InputError, match=code) as refusal:
        mla_deploy.export(folder, tmp_path / "bundle")
    assert "int8-all" in str(refusal.value)
    assert not (tmp_path / "bundle").exists()


def test_few_heads_beside_a_rope_key_of_many_tiles(tmp_path: Path) -> None:
    """What stands for zero beside six scales is more numbers a token than two heads have scores."""
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 96}
    source = write_llama(tmp_path / "source", hidden_size=96, **sizes)
    made = compress(source, tmp_path / "made").path
    bundle = mla_deploy.export(made, tmp_path / "bundle", cache_dtype="int8-all")
    tensors = {t["kind"]: t["elements"] for t in bundle.manifest["cache"]["tensors"]}
    assert tensors["rope_key_scale"] == 6
