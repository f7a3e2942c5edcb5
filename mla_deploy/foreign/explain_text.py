"""The picture of one layer before and after, drawn with characters, 78 wide."""

from __future__ import annotations

from itertools import zip_longest

from mla_deploy.foreign.explain import Explanation, Side

_WIDTH, _GAP = 37, 4
_FRAMES = ("┌─┐│└┘", "╔═╗║╚╝")
MARKS = {"cache": "cached", "all": "of all tokens, each step"}


def explanation_text(found: Explanation) -> str:
    """Two columns of boxes; a double frame is what is kept from call to call."""
    columns = [_boxes(found.before), _boxes(found.after)]
    lines = [
        f"{left or '':<{_WIDTH}}{' ' * _GAP}{right or ''}".rstrip()
        for left, right in zip_longest(*columns)
    ]
    return "\n".join(lines)


def comparison_rows(found: Explanation) -> list[tuple[str, str, str, str]]:
    """(what, before, after, ratio) of everything that is counted."""
    before, after = found.before, found.after
    pairs: list[tuple[str, int | None, int | None]] = [
        ("nodes of the layer", before.work.nodes, after.work.nodes),
        ("cache, bytes a token", before.cache_bytes, after.cache_bytes),
        ("multiply-adds of a step", before.work.multiply_adds, after.work.multiply_adds),
        ("of these for cached tokens", before.work.growing, after.work.growing),
    ]
    return [(what, _number(old), _number(new), _ratio(old, new)) for what, old, new in pairs]


def _number(value: int | None) -> str:
    return "not known" if value is None else f"{value:,}"


def _ratio(old: int | None, new: int | None) -> str:
    """How often the new number fits into the old one; nothing where one is missing or zero."""
    return f"{old / new:.2f}x" if old and new else ""


def _boxes(side: Side) -> list[str]:
    inner = _WIDTH - 4
    lines = [side.title.center(_WIDTH).rstrip()]
    for place, (what, shape, mark) in enumerate(side.steps):
        left, flat, right, wall, low_left, low_right = tuple(_FRAMES[mark == "cache"])
        told = MARKS.get(mark, "")
        top = f" {told} ".rjust(_WIDTH - 3, flat) + flat if told else flat * (_WIDTH - 2)
        lines.append(f"{left}{top}{right}")
        room = inner - len(what) - 1
        lines.append(f"{wall} {what} {shape[:room]:>{room}} {wall}")
        lines.append(f"{low_left}{flat * (_WIDTH - 2)}{low_right}")
        if place + 1 < len(side.steps):
            lines.append("↓".center(_WIDTH).rstrip())
    return lines
