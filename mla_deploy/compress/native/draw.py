"""The drawings of the native report: energy curves, loss against bytes, maps of heads.

Elements are made by `ElementTree`, which escapes; colours come from the page's classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from mla_deploy.compress.loss import EXACT, MINOR, VISIBLE
from mla_deploy.compress.page_chart import markup, mean_curve

if TYPE_CHECKING:
    from markupsafe import Markup

Facts = Mapping[str, Any]
_WIDTH, _HEIGHT = 560, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 10, 34
_FLOOR = 1e-7  # of mean KL: below it lies rounding
_SHADES = 5
_CELL = 10
_BOUNDS = ((EXACT, "exact below"), (MINOR, "minor below"), (VISIBLE, "visible below"))


class _Chart:
    """Lines and words in a frame. `x` and `y` map values to places."""

    def __init__(self, title: str, across: tuple[float, float], up: tuple[float, float]) -> None:
        self._across, self._up = across, up
        view = {"viewBox": f"0 0 {_WIDTH} {_HEIGHT}", "class": "chart", "role": "img"}
        self.root = ElementTree.Element("svg", view)
        ElementTree.SubElement(self.root, "title").text = title

    def x(self, value: float) -> float:
        low, high = self._across
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * (value - low) / (high - low or 1), 1)

    def y(self, value: float) -> float:
        low, high = self._up
        span = _HEIGHT - _BOTTOM - _TOP
        return round(_HEIGHT - _BOTTOM - span * (value - low) / (high - low or 1), 1)

    def level(self, value: float, told: str, kind: str = "grid") -> None:
        ends = {"x1": f"{_LEFT}", "x2": f"{_WIDTH - _RIGHT}",
                "y1": f"{self.y(value)}", "y2": f"{self.y(value)}"}  # fmt: skip
        ElementTree.SubElement(self.root, "line", {"class": kind, **ends})
        self.words(told, (_LEFT - 6, self.y(value) + 4), "end")

    def below(self, value: float, told: str) -> None:
        self.words(told, (self.x(value), _HEIGHT - _BOTTOM + 18), "middle")

    def line(self, kind: str, points: Iterable[tuple[float, float]]) -> None:
        told = " ".join(f"{self.x(a)},{self.y(b)}" for a, b in points)
        ElementTree.SubElement(self.root, "polyline", {"class": kind, "points": told})

    def dot(self, kind: str, at: tuple[float, float], told: str) -> None:
        place = {"cx": f"{self.x(at[0])}", "cy": f"{self.y(at[1])}", "r": "4", "class": kind}
        dot = ElementTree.SubElement(self.root, "circle", place)
        ElementTree.SubElement(dot, "title").text = told

    def words(self, text: str, at: tuple[float, float], anchor: str) -> None:
        placed = {"x": f"{at[0]}", "y": f"{at[1]}", "text-anchor": anchor}
        ElementTree.SubElement(self.root, "text", placed).text = text

    def done(self) -> Markup:
        return markup(self.root)


def energy_chart(sites: Sequence[Facts]) -> Markup:
    """Energy held by so many directions: of each latent, on average, as read, of the weights."""
    widest = max(site["rank"] for site in sites)
    chart = _Chart("Share of the energy, by directions", (0, widest), (0, 1))
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        chart.level(share, f"{100 * share:.0f} %")
    for width in sorted({0, widest // 4, widest // 2, 3 * widest // 4, widest}):
        chart.below(width, f"{width}")
    seen = [site["on_text"] for site in sites if site["on_text"] is not None]
    for each in seen:
        chart.line("faint", [(0, 0.0), *each["energy"]])
    chart.line("dashed", mean_curve([site["weight_energy"] for site in sites], widest))
    if seen:
        chart.line("read", mean_curve([each["readers_energy"] for each in seen], widest))
        chart.line("line", mean_curve([each["energy"] for each in seen], widest))
    return chart.done()


def loss_chart(forms: Sequence[Facts]) -> Markup:
    """Mean KL (logarithm) against bytes: cuts as one line, stores as dots by their basis."""
    sizes = [form["token_bytes"] for form in forms]
    levels = [_log(form["loss"]["mean_kl"]) for form in forms]
    low, high = math.floor(min(levels)), math.ceil(max(*levels, _log(0.06)))
    margin = max(1.0, 0.04 * (max(sizes) - min(sizes)))
    chart = _Chart("Mean KL against bytes of a token", (min(sizes) - margin, max(sizes) + margin),
                   (low, high))  # fmt: skip
    for power in range(low, high + 1):
        chart.level(power, f"1e{power}")
    for bound, told in _BOUNDS:
        if low < _log(bound) < high:
            chart.line("bound", [(min(sizes) - margin, _log(bound)), (max(sizes), _log(bound))])
            chart.words(told, (_WIDTH - _RIGHT, chart.y(_log(bound)) - 4), "end")
    ticks = sorted(set(sizes))
    for size in (ticks[0], ticks[len(ticks) // 2], ticks[-1]):
        chart.below(size, f"{size:,}")
    cuts = [form for form in forms if form["kind"] in ("cut", "16 bits")]
    chart.line("cuts", [(form["token_bytes"], _log(form["loss"]["mean_kl"])) for form in cuts])
    for form, level in zip(forms, levels, strict=True):
        loss = form["loss"]
        told = f"{form['name']}: {form['token_bytes']:,} B, mean KL {loss['mean_kl']:.2g}"
        kind = form["basis"] if form["kind"] == "store" else form["kind"].replace(" ", "-")
        chart.dot(f"form form-{kind}", (form["token_bytes"], level), told)
    return chart.done()


def head_map(rows: Sequence[Sequence[float]]) -> Markup:
    """[H, H] in shades of |value|: one path for each shade, so that many heads stay small."""
    count = len(rows)
    size = count * _CELL
    root = ElementTree.Element(
        "svg", {"class": "heads", "viewBox": f"0 0 {size} {size}", "role": "img"}
    )
    others = [abs(v) for i, row in enumerate(rows) for j, v in enumerate(row) if i != j]
    most = max(others, default=0.0)
    ElementTree.SubElement(root, "title").text = f"largest off the diagonal: {most:.2f}"
    ElementTree.SubElement(
        root, "rect", {"class": "track", "width": f"{size}", "height": f"{size}"}
    )
    paths: dict[int, list[str]] = {}
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            shade = min(round(abs(value) * _SHADES), _SHADES)
            if shade:
                paths.setdefault(shade, []).append(f"M{j * _CELL} {i * _CELL}h9v9h-9z")
    for shade, parts in sorted(paths.items()):
        ElementTree.SubElement(root, "path", {"class": f"shade-{shade}", "d": "".join(parts)})
    return markup(root)


def _log(kl: float) -> float:
    return math.log10(max(kl, _FLOOR)) if math.isfinite(kl) else 2.0
