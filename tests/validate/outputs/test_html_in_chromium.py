"""The HTML report in a headless Chromium: silent, nothing fetched, no wider than the screen."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mla_deploy.validate.outputs import write_html

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed, so no browser can be driven"
)
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason=f"no Chromium here: none of {', '.join(NAMES)} is on the PATH"
    ),
]
# What is cut off, or runs out of its place; clipped words for screen readers are meant to be.
OVERFLOWING = """() => [...document.querySelectorAll('main *, header *')]
  .filter(each => !each.closest('svg, .hidden, thead') && each.getBoundingClientRect().width > 0)
  .filter(each => each.getBoundingClientRect().right > innerWidth + 0.5)
  .map(each => each.tagName + '.' + each.className)"""
# WCAG contrast of every text with what is painted behind it; all our colours are opaque.
CONTRAST = """() => {
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const behind = each => {
    for (let at = each; at; at = at.parentElement) {
      const found = rgb(getComputedStyle(at).backgroundColor);
      if (found.length === 3 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  const texts = [...document.querySelectorAll('body *')].filter(each => !each.closest('svg')
    && [...each.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()));
  return texts.map(each => {
    const [text, paper] = [light(rgb(getComputedStyle(each).color)), light(behind(each))];
    return (Math.max(text, paper) + 0.05) / (Math.min(text, paper) + 0.05);
  }).reduce((least, each) => Math.min(least, each), 21);
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(params=["facts", "failed", "hostile", "full", "bare"])
def page_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_html(request.getfixturevalue(request.param), tmp_path / "report.html")
    return tmp_path / "report.html"


def test_silent_and_readable(browser: Any, page_file: Path, tmp_path: Path) -> None:
    told: list[str] = []
    for width in (375, 800, 1280):
        for theme in ("light", "dark"):
            context = browser.new_context(
                viewport={"width": width, "height": 800}, color_scheme=theme
            )
            page = context.new_page()
            page.on("console", lambda message: told.append(f"console: {message.text}"))
            page.on("pageerror", lambda error: told.append(f"error: {error}"))
            page.on("dialog", lambda dialog: told.append(f"dialog: {dialog.message}"))
            page.on("request", lambda request: told.append(f"request: {request.url}"))
            page.goto(page_file.as_uri())
            assert told == [f"request: {page_file.as_uri()}"]
            told.clear()
            assert page.evaluate(OVERFLOWING) == []
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert page.evaluate(CONTRAST) >= 4.5
            dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (dark == "rgb(15, 18, 22)") is (theme == "dark")
            shot = page.screenshot(path=tmp_path / f"{width}-{theme}.png", full_page=True)
            assert shot.startswith(b"\x89PNG")
            context.close()


def test_on_paper(browser: Any, page_file: Path) -> None:
    page = browser.new_page(color_scheme="dark")
    page.goto(page_file.as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate(CONTRAST) >= 4.5
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.close()
