"""A chart as one SVG element: levels, lines by class, dots, words. Colours come from the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np

if TYPE_CHECKING:
    from markupsafe import Markup

_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 250, 56, 14, 12, 34
_AXIS = 12  # more below, where the horizontal axis has a name
Point = tuple[float, float]


class Chart:
    """Lines and words in a frame. `x` and `y` map values to places."""

    def __init__(
        self, title: str, across: Point, up: Point, *, width: int = 480, axis: str | None = None
    ) -> None:
        """`across` and `up`: the values at the ends; `axis`: what the horizontal one is."""
        self._across, self._up = across, up
        self.right = width - _RIGHT
        self._floor = _HEIGHT - _BOTTOM - (0 if axis is None else _AXIS)
        view = {"viewBox": f"0 0 {width} {_HEIGHT}", "class": "chart", "role": "img"}
        self._root = ElementTree.Element("svg", view)
        ElementTree.SubElement(self._root, "title").text = title
        if axis is not None:
            self.words(axis, ((_LEFT + self.right) / 2, _HEIGHT - 8.0), "middle")

    def x(self, value: float) -> float:
        low, high = self._across
        return round(_LEFT + (self.right - _LEFT) * (value - low) / (high - low or 1), 1)

    def y(self, value: float) -> float:
        low, high = self._up
        return round(self._floor - (self._floor - _TOP) * (value - low) / (high - low or 1), 1)

    def level(self, value: float, told: str) -> None:
        """A line across, and its name on the left."""
        ends = {"x1": f"{_LEFT}", "x2": f"{self.right}",
                "y1": f"{self.y(value)}", "y2": f"{self.y(value)}"}  # fmt: skip
        ElementTree.SubElement(self._root, "line", {"class": "grid", **ends})
        self.words(told, (_LEFT - 6, self.y(value) + 4), "end")

    def below(self, value: float, told: str) -> None:
        """The name of a place on the horizontal axis."""
        self.words(told, (self.x(value), self._floor + 17), "middle")

    def line(self, kind: str, points: Iterable[Point]) -> None:
        told = " ".join(f"{self.x(a)},{self.y(b)}" for a, b in points)
        ElementTree.SubElement(self._root, "polyline", {"class": kind, "points": told})

    def upright(self, kind: str, value: float) -> None:
        """A line from the floor to the top."""
        self.line(kind, [(value, self._up[0]), (value, self._up[1])])

    def dot(self, kind: str, at: Point, told: str) -> None:
        place = {"cx": f"{self.x(at[0])}", "cy": f"{self.y(at[1])}", "r": "4", "class": kind}
        dot = ElementTree.SubElement(self._root, "circle", place)
        ElementTree.SubElement(dot, "title").text = told

    def words(self, text: str, at: Point, anchor: str) -> None:
        """`at` is a place, not a value."""
        placed = {"x": f"{at[0]}", "y": f"{at[1]}", "text-anchor": anchor}
        ElementTree.SubElement(self._root, "text", placed).text = text

    def drawn(self) -> Markup:
        return markup(self._root)


def markup(root: ElementTree.Element) -> Markup:
    """For a template: our own elements, which `ElementTree` escapes."""
    from markupsafe import Markup

    return Markup(ElementTree.tostring(root, encoding="unicode"))


def energy_axes(title: str, widest: int, *, width: int = 480, axis: str | None = None) -> Chart:
    """A share from none to all, over widths up to `widest`."""
    chart = Chart(title, (0, widest), (0, 1), width=width, axis=axis)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        chart.level(share, f"{100 * share:.0f} %")
    return chart


def mean_curve(curves: Sequence[Sequence[Sequence[float]]], widest: int) -> list[Point]:
    """Of curves (width, share) from zero, at widths up to `widest`."""
    widths = np.linspace(0, widest, 40)
    drawn = [np.array([(0, 0.0), *curve], float) for curve in curves]
    mean = np.mean([np.interp(widths, each[:, 0], each[:, 1]) for each in drawn], 0)
    return list(zip(widths.tolist(), mean.tolist(), strict=True))
