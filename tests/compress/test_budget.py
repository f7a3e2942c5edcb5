"""A budget of cached bytes: what fits is run, what loses least is written, and the bytes hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from mla_deploy import compress, read_config
from mla_deploy.compress.candidates import candidates, cut_widths, row_bytes_of, share_of
from mla_deploy.compress.heads_model import HeadFacts
from mla_deploy.compress.layer_widths import LESS, spread
from mla_deploy.compress.page import page
from mla_deploy.compress.report import CompressReport
from mla_deploy.errors import InputError
from tests.compress.llamas import fields_of, write_llama

SMOL = HeadFacts(heads=9, groups=3, head_dim=64, layers=30, width=576, context=2048, turning=64)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("plain") / "source")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its last layer adds next to nothing: cutting it costs nothing."""
    return write_llama(tmp_path_factory.mktemp("budget") / "source", last_layer=0.02)


@pytest.fixture(scope="module")
def by_layer(source: Path) -> CompressReport:
    """Whose layers should differ in width."""
    return compress(source, source.parent / "by_layer", budget="45%", context=256)


@pytest.mark.parametrize(("budget", "cache"), [(0.6, "int8-all"), ("45%", "int4-all")])
def test_what_loses_least_of_what_fits_is_written(
    budget: float | str, cache: str, plain: Path, tmp_path: Path
) -> None:
    report = compress(plain, tmp_path / "out", budget=budget, context=256)
    assert report.cached_bytes <= share_of(budget) * report.cached_bytes_source
    losses = {each.name: each.loss.mean_kl for each in report.weighed}
    chosen = [each for each in report.weighed if each.is_chosen]
    assert len(losses) >= 3 and [each.loss.mean_kl for each in chosen] == [min(losses.values())]
    assert report.form == chosen[0].form and report.form.cache == cache
    assert all(each.form.cached_bytes <= report.budget * report.cached_bytes_source
               for each in report.weighed if report.budget)  # fmt: skip
    kinds = {name.split(",")[0].split(" ")[0] for name in losses}
    assert kinds >= {"exact", "rank"}
    fields = fields_of(tmp_path / "out")
    assert fields["latent_cache_dtype"] == cache and "per_layer_config" not in fields
    # Held out: neither the rows that chose nor those that were learnt from.
    assert report.loss is not None and 0 < report.loss.mean_kl < 0.2
    assert report.loss.mean_kl != chosen[0].loss.mean_kl
    told = json.loads((tmp_path / "out" / "compress.json").read_text(encoding="utf-8"))
    assert told["weighed"] == [each.to_dict() for each in report.weighed]
    assert told["widths"] == [[32, 32], [32, 32]]


def test_all_of_the_bytes_are_exact_in_16_bits(source: Path, tmp_path: Path) -> None:
    report = compress(source, tmp_path / "out", budget=1.0, context=256)
    assert [each.name for each in report.weighed] == ["exact, fp16 cache"]
    assert report.loss is not None and report.loss.verdict == "exact"
    assert report.cached_bytes == report.cached_bytes_source


def test_layers_that_lose_more_keep_more(by_layer: CompressReport) -> None:
    assert by_layer.weighed[-1].name.startswith("ranks by layer")
    uniform, own = by_layer.weighed[-2:]
    assert own.is_chosen and own.loss.mean_kl < uniform.loss.mean_kl
    first, last = by_layer.form.layers
    assert first.rank + first.rope > last.rank + last.rope
    assert by_layer.cached_bytes <= 0.45 * by_layer.cached_bytes_source
    shown = page(by_layer.to_dict()).decode("utf-8")
    assert all(each.name in shown for each in by_layer.weighed)
    assert all(f"{each.rank} + {each.rope}" in shown for each in by_layer.form.layers)


def test_widths_by_layer_survive_saving_and_loading(
    by_layer: CompressReport, tmp_path: Path
) -> None:
    widths = [(each.rank, each.rope) for each in by_layer.form.layers]
    ids = torch.arange(60)[None] * 31 % 2048
    model = transformers.AutoModelForCausalLM.from_pretrained(by_layer.path, dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
    assert again.config.latent_cache_dtype == by_layer.form.cache
    for each in (model, again):
        found = [layer.self_attn for layer in each.model.layers]
        assert [(a.kv_lora_rank, a.qk_rope_head_dim) for a in found] == widths
    for folder in (by_layer.path, tmp_path / "again"):
        config = read_config(folder)
        assert [(layer.rank, layer.rope) for layer in config.layers] == widths


def test_spread_gives_the_same_total_and_more_to_what_loses_more() -> None:
    losses = np.array([[0.01, 0.0001, 0.003], [0.1, 0.0002, 0.01]])
    widths = spread(100, losses, 256)
    assert 100 * 3 - 3 * 4 <= sum(widths) <= 300
    assert widths[0] > widths[2] > widths[1] >= 50
    # No layer above what there is, and no NaN where a cut loses nothing.
    assert max(spread(100, losses, 110)) <= 110
    assert sum(spread(100, np.zeros((2, 3)), 256)) <= 300


def test_spread_is_the_best_of_all_for_such_losses() -> None:
    at, slope = np.array([1.0, 2.0]), np.array([0.05, 0.02])
    usual = 96
    losses = np.exp(at - slope * np.array([[usual], [LESS * usual]]))
    widths = spread(usual, losses, 512)

    def total(first: int) -> float:
        return float(np.exp(at - slope * np.array([first, 2 * usual - first])).sum())

    best = min(range(48, 145), key=total)
    assert abs(widths[0] - best) <= 4


@pytest.mark.parametrize("share", [0.1, 0.3, 0.4, 0.5, 0.52, 0.8, 0.99, 1.0])
def test_every_candidate_fits(share: float) -> None:
    found = candidates(SMOL, share, 1024, "fp16")
    assert 1 <= len(found) <= 5
    assert len({each.name for each in found}) == len(found)
    for each in found:
        assert each.form.cached_bytes <= share * 30 * 768, each.name
        assert all(s.rank >= 64 and s.rank + s.rope <= 384 for s in each.form.layers)


def test_bytes_of_the_model_of_the_facts() -> None:
    assert [row_bytes_of((192, 192), cache) for cache in ("fp16", "int8-all", "int4-all")] == [
        768, 398, 304,
    ]  # fmt: skip
    names = [each.name for each in candidates(SMOL, 0.52, 1024, "fp16")]
    assert names[:2] == ["exact, int8-all cache", "exact, int4-all cache"]
    assert cut_widths(SMOL, 384, "fp16") == (140, 52)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"budget": "0%"}, "more than 0%"),
    "more than there is": ({"budget": "101%"}, "at most 100%"),
    "a count": ({"budget": 52}, "at most 100%"),
    "a word": ({"budget": "half"}, "'half'"),
    "no number": ({"budget": "nan"}, "'nan'"),
    "too little": ({"budget": "5%"}, "the least"),
    "with a rank": ({"budget": 0.5, "rank": 24}, "together with rank"),
    "with a rope width": ({"budget": 0.5, "rope_dim": 8}, "together with rope_dim"),
    "of TransMLA": ({"budget": 0.5, "method": "transmla"}, "method transmla"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str, source: Path, tmp_path: Path) -> None:
    options, told = REFUSED[what]
    with pytest.raises(InputError, match="CMP-BUDGET") as caught:
        compress(source, tmp_path / "out", **options)
    assert told in f"{caught.value} {caught.value.hint}"
    assert list(tmp_path.iterdir()) == []


def test_the_least_that_is_named_is_enough(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        compress(source, tmp_path / "out", budget=0.01, context=256)
    least = str(caught.value.hint).split()[1]
    report = compress(source, tmp_path / "out", budget=least, context=256)
    assert report.cached_bytes <= share_of(least) * report.cached_bytes_source


def test_a_text_too_short_to_choose_by(source: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("There was a man. " * 800, encoding="utf-8")
    with pytest.raises(InputError, match="CMP-TEXT"):
        compress(source, tmp_path / "out", budget=0.5, calibrate=tmp_path / "text.txt")


def test_config_counts_the_widths_of_each_layer(by_layer: CompressReport) -> None:
    config = read_config(by_layer.path)
    assert sum(layer.row_width for layer in config.layers) == by_layer.cached_values
