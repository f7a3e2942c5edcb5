"""The drawings of the native report: energy curves, loss against bytes, maps of heads.

Elements are made by `ElementTree`, which escapes; colours come from the page's classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from mla_deploy.compress.loss import EXACT, MINOR, VISIBLE
from mla_deploy.compress.page_chart import Chart, energy_axes, markup, mean_curve

if TYPE_CHECKING:
    from markupsafe import Markup

Facts = Mapping[str, Any]
_WIDTH = 560
_FLOOR = 1e-7  # of mean KL: below it lies rounding
_SHADES = 5
_CELL = 10
_BOUNDS = ((EXACT, "exact below"), (MINOR, "minor below"), (VISIBLE, "visible below"))


def energy_chart(sites: Sequence[Facts]) -> Markup:
    """Energy held by so many directions: of each latent, on average, as read, of the weights."""
    widest = max(site["rank"] for site in sites)
    chart = energy_axes("Share of the energy, by directions", widest, width=_WIDTH)
    for width in sorted({0, widest // 4, widest // 2, 3 * widest // 4, widest}):
        chart.below(width, f"{width}")
    seen = [site["on_text"] for site in sites if site["on_text"] is not None]
    for each in seen:
        chart.line("faint", [(0, 0.0), *each["energy"]])
    chart.line("dashed", mean_curve([site["weight_energy"] for site in sites], widest))
    if seen:
        chart.line("read", mean_curve([each["readers_energy"] for each in seen], widest))
        chart.line("line", mean_curve([each["energy"] for each in seen], widest))
    return chart.drawn()


def loss_chart(forms: Sequence[Facts]) -> Markup:
    """Mean KL (logarithm) against bytes: cuts as one line, stores as dots by their basis."""
    sizes = [form["token_bytes"] for form in forms]
    levels = [_log(form["loss"]["mean_kl"]) for form in forms]
    low, high = math.floor(min(levels)), math.ceil(max(*levels, _log(0.06)))
    margin = max(1.0, 0.04 * (max(sizes) - min(sizes)))
    ends = (min(sizes) - margin, max(sizes) + margin)
    chart = Chart("Mean KL against bytes of a token", ends, (low, high), width=_WIDTH)
    for power in range(low, high + 1):
        chart.level(power, f"1e{power}")
    for bound, told in _BOUNDS:
        if low < _log(bound) < high:
            chart.line("bound", [(ends[0], _log(bound)), (max(sizes), _log(bound))])
            chart.words(told, (chart.right, chart.y(_log(bound)) - 4), "end")
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
    return chart.drawn()


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
