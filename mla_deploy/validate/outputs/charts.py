"""Drawing for the HTML report: positions on a scale, and one line chart as inline SVG.

Bars are drawn by the template; here is only where they end. Colours are classes of the page's
style sheet, so that both themes and paper have their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from markupsafe import Markup

_WIDTH, _HEIGHT = 480, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 26, 42
_HEADROOM = 1.6  # over the largest median: one slow round must not flatten the line
_NICE = (1, 2, 2.5, 5, 10)
Place = tuple[float, float]


def log_share(value: float, floor: float, top: float) -> float:
    """Percent of the way from `floor` to `top` on a log scale; what lies outside is cut."""
    if value <= floor:
        return 0.0
    share = math.log10(value / floor) / math.log10(top / floor)
    return round(100 * min(share, 1.0), 2)


def linear_share(value: float, top: float) -> float:
    """Percent of `top`; something that is there is never drawn as nothing."""
    return 0.0 if value <= 0 or top <= 0 else round(max(100 * min(value / top, 1.0), 0.6), 2)


def step_chart(points: Sequence[dict[str, Any]], told: str) -> Markup:
    """Milliseconds a step (from 0 up) over tokens cached (log scale): medians, least to most."""
    from markupsafe import Markup

    chart = ElementTree.Element(
        "svg", {"viewBox": f"0 0 {_WIDTH} {_HEIGHT}", "role": "img", "class": "chart",
                "aria-labelledby": "steps-title steps-told"},
    )  # fmt: skip
    _text(chart, "title", "Milliseconds a decode step, by tokens cached", id="steps-title")
    _text(chart, "desc", told, id="steps-told")
    top = nice_top(_HEADROOM * max(point["median_ms"] for point in points))
    for tick in _ticks(top):
        y = _y(tick, top)
        _shape(chart, "line", "grid", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y)
        label = _text(chart, "text", f"{tick:g}", x=_LEFT - 8, y=y + 4)
        label.set("text-anchor", "end")
    _text(chart, "text", "ms a step", x=0, y=12)
    places = list(_places(points, top))
    for point, (x, _), shown in zip(points, places, _shown(places), strict=True):
        _shape(chart, "line", "spread", x1=x, x2=x,
               y1=_y(point["min_ms"], top), y2=_y(point["max_ms"], top))  # fmt: skip
        if shown:
            label = _text(chart, "text", f"{point['context']:,}", x=x, y=_HEIGHT - _BOTTOM + 18)
            label.set("text-anchor", "middle")
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    _shape(chart, "polyline", "line", points=line)
    for x, y in places:
        _shape(chart, "circle", "dot", cx=x, cy=y, r=3.5)
    axis = _text(chart, "text", "tokens cached", x=_WIDTH - _RIGHT, y=_HEIGHT - 6)
    axis.set("text-anchor", "end")
    # ElementTree has escaped every text.
    return Markup(ElementTree.tostring(chart, encoding="unicode"))


def nice_top(most: float) -> float:
    """The end of an axis: the next 1, 2, 2.5 or 5 times a power of ten."""
    if most <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(most))
    return next(step * power for step in _NICE if step * power >= most * (1 - 1e-9))


def _ticks(top: float) -> Iterator[float]:
    parts = 4 if round(top / 10 ** math.floor(math.log10(top)), 6) in (1, 2) else 5
    yield from (top * index / parts for index in range(parts + 1))


def _y(value: float, top: float) -> float:
    room = _HEIGHT - _TOP - _BOTTOM
    return round(_TOP + room * (1 - min(value / top, 1.0)), 1)


def _places(points: Sequence[dict[str, Any]], top: float) -> Iterator[Place]:
    """A context of 0 tokens stands where 1 does."""
    logs = [math.log2(max(point["context"], 1)) for point in points]
    span = logs[-1] - logs[0] or 1.0
    inset, room = 12, _WIDTH - _LEFT - _RIGHT - 24
    for log, point in zip(logs, points, strict=True):
        yield _LEFT + inset + room * (log - logs[0]) / span, _y(point["median_ms"], top)


def _shown(places: Sequence[Place]) -> Iterator[bool]:
    """Which labels have room; the last one always has."""
    last = -math.inf
    for index, (x, _) in enumerate(places):
        room = x - last >= 40 and (index == len(places) - 1 or places[-1][0] - x >= 40)
        shown = room or index == len(places) - 1
        last = x if shown else last
        yield shown


def _shape(parent: ElementTree.Element, tag: str, kind: str, **given: object) -> None:
    ElementTree.SubElement(parent, tag, {"class": kind, **{k: str(v) for k, v in given.items()}})


def _text(parent: ElementTree.Element, tag: str, text: str, **given: object) -> ElementTree.Element:
    element = ElementTree.SubElement(parent, tag, {k: str(v) for k, v in given.items()})
    element.text = text
    return element
