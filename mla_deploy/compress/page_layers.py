"""The parts of the page that go through all layers: directions by head, errors by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mla_deploy.compress.page_chart import Chart

Facts = Mapping[str, Any]
Table = Sequence[Sequence[float]]
SCALE_FROM = 0.9  # cosines below it are drawn as lost
_WORST = 6
_WIDE, _NARROW, _MANY = 30, 15, 12  # cells of few heads and of many
_LEAST_AXIS = 0.001


def layer_facts(report: Facts) -> dict[str, Any]:
    """What `layers.html.jinja` shows."""
    outputs = report["outputs"]
    errors = [each["attention_error"] for each in outputs]
    worst = int(np.argmax(errors))
    return {
        "scale_from": SCALE_FROM,
        "maps": list(_maps(report)),
        "worst_heads": _worst_heads(report),
        "error_chart": _error_chart(outputs).drawn(),
        "worst_layer": worst,
        "worst_error": share_text(errors[worst]),
        "last_error": share_text(outputs[-1]["stream_error"]),
    }


def share_text(share: float) -> str:
    """A share as a percentage; what fp32 cannot tell from nothing is nothing."""
    if share < 1e-5:
        return "0 %"
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def _kinds(report: Facts) -> Iterator[tuple[str, str, Table, Table]]:
    """(map, one head of it, cosines, errors), each layer by layer and head by head."""
    views, outputs = report["views"], report["outputs"]
    for name, kind in (("Keys", "key"), ("Values", "value")):
        cosines, errors = (
            [view[f"{kind}_{what}"] for view in views] for what in ("cosine", "error")
        )
        yield f"{name}, by key head", kind, cosines, errors
    cosines, errors = ([each[what] for each in outputs] for what in ("cosine", "error"))
    yield "Outputs, by query head", "output", cosines, errors


def _maps(report: Facts) -> Iterator[dict[str, Any]]:
    for title, _, cosines, _ in _kinds(report):
        step = _WIDE if len(cosines[0]) <= _MANY else _NARROW
        yield {
            "title": title,
            "step": step,
            "every": 1 if len(cosines[0]) <= _MANY else 4,
            "rows": [[cosine_cell(value) for value in row] for row in cosines],
        }


def cosine_cell(cosine: float) -> tuple[str, float]:
    """Its text, and how much is lost, of 1."""
    lost = (1.0 - cosine) / (1.0 - SCALE_FROM)
    return f"{cosine:.4f}", round(min(max(lost, 0.0), 1.0), 3)


def _worst_heads(report: Facts) -> list[tuple[str, str, str]]:
    every = [
        (cosine, error, f"layer {layer}, {kind} {head}")
        for _, kind, cosines, errors in _kinds(report)
        for layer, rows in enumerate(zip(cosines, errors, strict=True))
        for head, (cosine, error) in enumerate(zip(*rows, strict=True))
    ]
    return [
        (name, f"{cosine:.4f}", share_text(error)) for cosine, error, name in sorted(every)[:_WORST]
    ]


def _error_chart(outputs: Sequence[Facts]) -> Chart:
    own = [(float(i), each["attention_error"]) for i, each in enumerate(outputs)]
    built_up = [(float(i), each["stream_error"]) for i, each in enumerate(outputs)]
    highest = _rounded_up(max(_LEAST_AXIS, *(error for _, error in (*own, *built_up))))
    last = len(outputs) - 1
    chart = Chart("Relative error of each layer", (0, last), (0, highest), axis="layer")
    for level in (highest * part / 4 for part in range(5)):
        chart.level(level, f"{100 * level:.3g} %")
    for place in sorted({round(last * part / 4) for part in range(5)}):
        chart.below(place, f"{place}")
    chart.line("dashed", built_up)
    chart.line("line", own)
    return chart


def _rounded_up(value: float) -> float:
    """To 1, 2 or 4 times a power of ten."""
    power = 10.0 ** np.floor(np.log10(value))
    return float(next(power * step for step in (1, 2, 4, 10) if power * step >= value * 0.999999))
