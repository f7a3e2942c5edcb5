"""The HTML page: whole, self-contained, escaped, and it shows the numbers of the report."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mla_deploy import compress
from mla_deploy.compress.page import page
from mla_deploy.compress.page_layers import layer_facts
from mla_deploy.compress.room import cache_forms, tokens_that_fit
from tests.compress.llamas import write_llama

VOID = {"meta", "br", "rect", "line", "circle", "path", "polyline"}


class Balanced(HTMLParser):
    """Every element that opens closes, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert not any(name.startswith("on") for name, _ in attrs), "a script"
        assert tag not in ("script", "link", "img", "iframe")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module", params=["exact", "low-rank"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("page")
    source = write_llama(folder / "source")
    options = {} if request.param == "exact" else {"rank": 24, "rope_dim": 8, "context": 256}
    return compress(source, folder / "out", **options).to_dict()


def test_the_page_is_whole_and_fetches_nothing(report: Any) -> None:
    text = page(report).decode("utf-8")
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert not re.search(r"(?:src|href|url)\s*[=(]", text)
    assert "prefers-color-scheme: dark" in text
    shown = " ".join(parser.texts)
    assert f"{report['cached_values']:,} of {report['cached_values_source']:,}" in shown
    assert report["loss"]["verdict"] in shown
    assert "Compass of layer" in shown and "Outputs, by query head" in shown
    for size in (2 * 2 * 6, 2 * 2 * 2):  # every head's keys and values, the source's; two layers
        assert f"{2 * size * 16:,}" in shown


def test_hostile_texts_are_escaped(report: Any) -> None:
    evil = "<script>alert(1)</script>"
    loss = {**report["loss"], "text": evil}
    text = page({**report, "loss": loss, "notes": [evil]}).decode("utf-8")
    assert evil not in text and "&lt;script&gt;" in text


def test_a_visible_loss_is_no_success(report: Any) -> None:
    loss = {**report["loss"], "verdict": "visible"}
    assert b'<header class="no">' in page({**report, "loss": loss})


def test_a_page_for_people(report: Any, tmp_path: Path) -> None:
    """Every head of every layer has its cell."""
    text = page(report).decode("utf-8")
    cells = sum(len(v["key_cosine"]) + len(v["value_cosine"]) for v in report["views"])
    cells += sum(len(each["cosine"]) for each in report["outputs"])
    turning = report["source_heads"]["key"] * (report["source_heads"]["width"] // 2)
    assert text.count('<rect class="cell"') == cells + turning


def test_an_exact_form_has_every_view_and_loses_nothing(report: Any) -> None:
    views, outputs = report["views"], report["outputs"]
    assert len(views) == len(outputs) == report["layers"]
    least = min(min(v["key_cosine"] + v["value_cosine"]) for v in views)
    least = min(least, *(min(each["cosine"]) for each in outputs))
    worst = max(each["attention_error"] for each in outputs)
    if report["method"] == "exact":
        assert least > 1 - 1e-6 and worst < 1e-5
        assert all(len(v["turning"]) == 16 for v in views)  # two key heads of eight pairs
    else:
        assert least < 0.99 and worst > 0.05


def test_the_worst_are_named(report: Any) -> None:
    """By what the page is given: one bad head, one bad layer."""
    outputs = [dict(each) for each in report["outputs"]]
    outputs[1]["cosine"] = [1.0, 1.0, 1.0, 0.25, 1.0, 1.0]
    outputs[1]["attention_error"] = 3.0
    told = layer_facts({**report, "outputs": outputs})
    assert told["worst_heads"][0][:2] == ("layer 1, output 3", "0.2500")
    assert (told["worst_layer"], told["worst_error"]) == (1, "300 %")


def test_room_by_hand() -> None:
    """Llama-3-8B's sizes: 131,072 bytes a token in 16 bits, as its GQA takes."""
    widths = [[1024, 1024]] * 32
    report = {
        "source_heads": {"query": 32, "key": 8, "width": 128}, "layers": 32, "widths": widths,
        "cached_values_source": 65536, "cached_values": 65536, "cache_dtype": "int8-all",
        "cached_bytes": 0, "parameters": 8_030_261_248, "longest_text": 8192,
    }  # fmt: skip
    forms = {each.name: each for each in cache_forms(report)}
    assert forms["MHA: keys and values of all 32 heads, 16 bits"].token_bytes == 524_288
    assert forms["GQA: the source's 8 key heads, 16 bits"].token_bytes == 131_072
    assert forms["this latent, int8"].token_bytes == 32 * (1024 + 4 + 2048)
    assert forms["this latent, int8-all"].token_bytes == 32 * (1024 + 2 + 1024 + 64)
    assert [name for name, each in forms.items() if each.is_chosen] == ["this latent, int8-all"]
    assert tokens_that_fit(report, "orin-nano-8", 131_072) == 0  # 30 GiB of weights
    usable = int((80 - 1.5) * 2**30) - 4 * 8_030_261_248
    assert tokens_that_fit(report, "h100", 131_072) == usable // 131_072


def test_heads_that_do_not_pair_or_group() -> None:
    report = {
        "source_heads": {"query": 4, "key": 4, "width": 8}, "layers": 1, "widths": [[33, 32]],
        "cached_values_source": 64, "cached_values": 65, "cache_dtype": None,
        "cached_bytes": 130, "parameters": 10, "longest_text": 64,
    }  # fmt: skip
    names = [each.name for each in cache_forms(report)]
    assert names[0] == "MHA: the source's 4 key heads, 16 bits"
    assert not [name for name in names if "int4" in name]  # an odd latent has no pairs
