"""The picture of one layer before and after, as an SVG of its own: no script, no font, no network.

It follows the reader's light or dark setting.
"""

from __future__ import annotations

from html import escape

from mla_deploy.foreign.explain import Explanation, Side
from mla_deploy.foreign.explain_text import MARKS, comparison_rows

_WIDE, _MARGIN, _BOX, _STEP = 400, 32, 46, 74
_STYLE = """
  svg { background: #ffffff; font: 14px system-ui, sans-serif }
  text { fill: #1b1f24 }
  .title { font-size: 18px; font-weight: 600 }
  .head { font-size: 15px; font-weight: 600 }
  .dim { fill: #57606a }
  .mark { font-size: 12px; font-weight: 600 }
  .box { fill: #f6f8fa; stroke: #8c959f }
  .cache { fill: #ddf4ff; stroke: #0969da; stroke-width: 2.5 }
  .all { fill: #fff1e5; stroke: #bc4c00; stroke-width: 1.5; stroke-dasharray: 5 3 }
  text.cache { fill: #0550ae; stroke: none }
  text.all { fill: #953800; stroke: none }
  .line { stroke: #8c959f; stroke-width: 1.5; fill: none }
  .old { fill: #bc4c00 }
  .new { fill: #0969da }
  @media (prefers-color-scheme: dark) {
    svg { background: #0d1117 }
    text { fill: #e6edf3 }
    .dim { fill: #9198a1 }
    .box { fill: #161b22; stroke: #6e7681 }
    .cache { fill: #0c2d6b; stroke: #58a6ff }
    .all { fill: #3d1300; stroke: #f0883e }
    text.cache { fill: #79c0ff }
    text.all { fill: #ffa657 }
    .line { stroke: #6e7681 }
    .old { fill: #f0883e }
    .new { fill: #58a6ff }
  }
"""


def explanation_svg(found: Explanation) -> str:
    """The whole file."""
    deepest = max(len(found.before.steps), len(found.after.steps))
    bars_at = 96 + deepest * _STEP
    rows = comparison_rows(found)
    width, height = 2 * _WIDE + 3 * _MARGIN, bars_at + 32 + len(rows) * 62
    title = f"Layer {found.layer}: a step at {found.context:,} tokens"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-label="{escape(title)}">',
        f"<style>{_STYLE}</style>",
        f"<title>{escape(title)}</title>",
        '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path class="line" d="M1 1 L7 4 L1 7"/></marker>',
        _text(_MARGIN, 36, title, "title"),
        *_side(found.before, _MARGIN, "old"),
        *_side(found.after, 2 * _MARGIN + _WIDE, "new"),
    ]
    for place, row in enumerate(rows):
        parts += _bars(row, bars_at + 32 + place * 62, width - 2 * _MARGIN)
    return "\n".join([*parts, "</svg>", ""])


def _side(side: Side, left: int, kind: str) -> list[str]:
    """`kind` is the colour of its bars, shown before the heading."""
    parts = [
        f'<rect class="{kind}" x="{left}" y="60" width="14" height="14" rx="2"/>',
        _text(left + 22, 72, side.title, "head"),
    ]
    middle = left + _WIDE // 2
    for place, (what, shape, mark) in enumerate(side.steps):
        top = 92 + place * _STEP
        parts.append(
            f'<rect class="{mark or "box"}" x="{left}" y="{top}" width="{_WIDE}" '
            f'height="{_BOX}" rx="6"/>'
        )
        told = MARKS.get(mark, "")
        base = top + (20 if told else 28)
        parts.append(_text(left + 14, base, what))
        parts.append(_text(left + _WIDE - 14, base, shape, "dim", end=True))
        if told:
            parts.append(_text(left + 14, top + 38, told, f"mark {mark}"))
        if place + 1 < len(side.steps):
            parts.append(
                f'<path class="line" marker-end="url(#tip)" '
                f'd="M{middle} {top + _BOX} V{top + _STEP - 3}"/>'
            )
    return parts


def _bars(row: tuple[str, str, str, str], top: int, width: int) -> list[str]:
    what, old, new, ratio = row
    numbers = [float(each.replace(",", "")) if each[0].isdigit() else 0.0 for each in (old, new)]
    most = max(*numbers, 1.0)
    less = f"{ratio} less" if ratio and numbers[1] < numbers[0] else ""
    room = width - 330
    parts = [
        _text(_MARGIN, top + 16, what),
        _text(_MARGIN, top + 36, less, "dim"),
    ]
    for place, (number, told) in enumerate(zip(numbers, (old, new), strict=True)):
        y = top + 4 + place * 20
        size = max(2, round(room * number / most)) if number else 0
        kind = ("old", "new")[place]
        parts.append(
            f'<rect class="{kind}" x="{_MARGIN + 200}" y="{y}" width="{size}" height="14" rx="2"/>'
        )
        parts.append(_text(_MARGIN + 208 + size, y + 12, told, "dim"))
    return parts


def _text(x: int, y: int, told: str, kind: str = "", *, end: bool = False) -> str:
    anchor = ' text-anchor="end"' if end else ""
    name = f' class="{kind}"' if kind else ""
    return f'<text x="{x}" y="{y}"{name}{anchor}>{escape(told)}</text>'
