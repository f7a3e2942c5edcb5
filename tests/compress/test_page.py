"""The HTML page: whole, self-contained, escaped, and it shows the numbers of the report."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mla_deploy import compress
from mla_deploy.compress.page import page
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
    assert ("Compass of layer" in shown) == bool(report["views"])


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
    turning = len(report["views"]) and report["source_heads"]["key"] * (
        report["source_heads"]["width"] // 2
    )
    assert text.count('<rect class="cell"') == cells + turning
