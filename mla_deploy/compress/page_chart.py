"""A chart of lines as one SVG element: axes from zero, ticks, lines by class, an upright mark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np

if TYPE_CHECKING:
    from markupsafe import Markup

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 480, 250, 56, 46, 12, 12
Points = Sequence[tuple[float, float]]
Ticks = Sequence[tuple[float, str]]


@dataclass(frozen=True)
class Chart:
    """`lines`: (class, points); `mark`: where an upright line stands."""

    title: str
    across: str  # what the horizontal axis is
    x_ticks: Ticks
    y_ticks: Ticks
    lines: Sequence[tuple[str, Points]]
    mark: float | None = None

    def drawn(self) -> Markup:
        root = ElementTree.Element(
            "svg", {"viewBox": f"0 0 {_WIDTH} {_HEIGHT}", "class": "chart", "role": "img"}
        )
        ElementTree.SubElement(root, "title").text = self.title
        for value, text in self.y_ticks:
            self._line(root, "grid", [(0.0, value), (self._widest, value)])
            self._text(root, text, (_LEFT - 6.0, self._y(value) + 4), "end")
        for value, text in self.x_ticks:
            self._text(root, text, (self._x(value), _HEIGHT - _BOTTOM + 16.0), "middle")
        self._text(root, self.across, ((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8.0), "middle")
        for kind, points in self.lines:
            self._line(root, kind, points)
        if self.mark is not None:
            self._line(root, "chosen", [(self.mark, 0.0), (self.mark, self._highest)])
        return markup(root)

    @property
    def _widest(self) -> float:
        return max([x for x, _ in self.x_ticks] + [x for _, line in self.lines for x, _ in line])

    @property
    def _highest(self) -> float:
        return max(value for value, _ in self.y_ticks)

    def _x(self, value: float) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * value / (self._widest or 1.0), 2)

    def _y(self, value: float) -> float:
        return round(_HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * value / self._highest, 2)

    def _line(self, root: ElementTree.Element, kind: str, points: Points) -> None:
        told = " ".join(f"{self._x(x)},{self._y(y)}" for x, y in points)
        ElementTree.SubElement(root, "polyline", {"class": kind, "points": told})

    def _text(
        self, root: ElementTree.Element, text: str, at: tuple[float, float], anchor: str
    ) -> None:
        placed = {"x": f"{at[0]}", "y": f"{at[1]}", "text-anchor": anchor}
        ElementTree.SubElement(root, "text", placed).text = text


def markup(root: ElementTree.Element) -> Markup:
    """For a template: our own elements, which `ElementTree` escapes."""
    from markupsafe import Markup

    return Markup(ElementTree.tostring(root, encoding="unicode"))


def mean_curve(curves: Sequence[Sequence[Sequence[float]]], widest: int) -> Points:
    """Of curves (width, share) from zero, at widths up to `widest`."""
    widths = np.linspace(0, widest, 40)
    drawn = [np.array([(0, 0.0), *curve], float) for curve in curves]
    mean = np.mean([np.interp(widths, each[:, 0], each[:, 1]) for each in drawn], 0)
    return list(zip(widths.tolist(), mean.tolist(), strict=True))
