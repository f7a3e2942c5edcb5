"""The HTML page: well formed, alone in the world, inert to foreign words, its figures true."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from mla_deploy.validate.outputs.html_page import html_bytes
from tests.validate.outputs.conftest import HOSTILE

KINDS = ["facts", "failed", "hostile", "full", "bare"]
VOID = {"meta", "link", "br", "hr", "img", "input"}
# What may fetch, run or lead away.
FETCHING = {"src", "href", "srcset", "action", "formaction", "data", "poster", "xlink:href",
            "background", "style"}  # fmt: skip
FORBIDDEN = {"script", "link", "iframe", "object", "embed", "img", "base", "form", "image", "use",
             "foreignobject", "a"}  # fmt: skip


class Page(HTMLParser):
    """Elements must close in order; tags, attributes and texts are kept."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def _page(facts: dict[str, Any]) -> Page:
    return Page(html_bytes(facts).decode())


@pytest.mark.parametrize("kind", KINDS)
def test_well_formed_and_alone(kind: str, request: pytest.FixtureRequest) -> None:
    facts = request.getfixturevalue(kind)
    text = html_bytes(facts).decode()
    page = Page(text)
    assert not FORBIDDEN & set(page.tags)
    odd = [name for name, _ in page.attributes if name in FETCHING or name.startswith("on")]
    assert odd == []
    assert not re.search(r"https?:|//[a-z]|url\(|@import|javascript:", text, re.IGNORECASE)
    assert text.startswith("<!doctype html>\n<html lang=")


def test_parser_says_no() -> None:
    with pytest.raises(AssertionError):
        Page("<p><b></p></b>")


def test_both_themes_phone_and_paper(facts: dict[str, Any]) -> None:
    text = html_bytes(facts).decode()
    light, dark = text.split("@media (prefers-color-scheme: dark)")
    names = set(re.findall(r"(--\w[\w-]*):", light.partition(":root {")[2].partition("}")[0]))
    assert names == set(re.findall(r"(--\w[\w-]*):", dark.partition("}")[0]))
    printed = text.partition("@media print")[2]
    assert names == set(re.findall(r"(--\w[\w-]*):", printed.partition("}")[0]))
    assert "@media screen and (max-width:" in text and 'name="viewport"' in text


def test_verdict_comes_first(facts: dict[str, Any], failed: dict[str, Any]) -> None:
    def opening(found: dict[str, Any]) -> str:
        words = " ".join(text.strip() for text in _page(found).texts if text.strip())
        return words.partition("Parity, case by case")[0]

    # `facts` and `failed` are one dictionary, changed in place; the verdict is a key of its own.
    assert "NOT equal to its source" in opening(failed)
    assert "Gates not met" in opening(failed) and "layer.1/MatMul_3" in opening(failed)
    right = {**facts, "passed": True}
    assert "NOT equal" not in opening(right) and "Equal to its source" in opening(right)


def test_foreign_words_are_shown_and_nothing_else(hostile: dict[str, Any]) -> None:
    page = _page(hostile)
    assert "script" not in page.tags
    assert page.tags.count("style") == 1
    seen = "".join(page.texts)
    assert seen.count("<script>alert(1)</script>") > len(hostile["cases"])
    assert HOSTILE.replace("\x00", "") not in html_bytes(hostile).decode()
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_figures_of_the_page_are_those_of_the_report(full: dict[str, Any]) -> None:
    seen = " ".join(" ".join(_page(full).texts).split())
    memory, cache = full["memory"], full["cache"]
    for wanted in (
        f"{memory['cache_bytes']:,} B",
        f"{memory['weight_file_bytes']:,} B",
        *(f"{form['bytes_per_token']:,} B" for form in cache["forms"]),
        *(f"{point['median_ms']:.2f}" for point in full["speed"]["points"]),
        *(part["where"] for part in full["ran"]["parts"]),
        full["bundle_digest"],
        "absorb projections",
        "novel.txt",
        "Equal to the goldens".replace("Equal", "NOT equal"),
    ):
        assert wanted in seen, wanted


@pytest.mark.parametrize("kind", KINDS)
def test_every_drawing_says_what_it_shows(kind: str, request: pytest.FixtureRequest) -> None:
    text = html_bytes(request.getfixturevalue(kind)).decode()
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        assert "<title" in drawing or 'aria-hidden="true"' in drawing
    charts = [each for each in re.findall(r"<svg.*?</svg>", text, re.DOTALL) if "chart" in each]
    assert all("<desc" in chart for chart in charts)
    assert len(charts) == (0 if kind == "bare" else 1)


def test_bars_grow_with_what_they_show(facts: dict[str, Any]) -> None:
    """A case at its gate ends at the gate's line, one far beyond it fills its bar."""
    case = facts["cases"][0]
    shares = {}
    for factor in (1e-3, 1.0, 1e6):
        case["logits"] |= {"rel_l2": factor * facts["gates"]["rel_l2"], "mean_kl": 0.0}
        case["logits"]["max_abs"] = 0.0
        case["cache"]["worst_rel_l2"] = 0.0
        text = html_bytes({**facts, "cases": [case]}).decode()
        gate = float(re.findall(r'class="gate" x1="([\d.]+)"', text)[0])
        end = float(re.findall(r'class="good" width="([\d.]+)"', text)[0])
        shares[factor] = (end, gate)
    assert shares[1.0][0] == shares[1.0][1]
    assert shares[1e-3][0] < shares[1e-3][1]
    assert shares[1e6][0] == 100
