"""The report of `compress` as one HTML page: verdict, matrices, directions, memory, loss.

Everything in it is in compress.json too. Nothing is fetched and nothing runs; colours and layout
are those of the report of `validate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from mla_deploy.compress.choice_page import choice_facts
from mla_deploy.shapes import byte_text

if TYPE_CHECKING:
    from markupsafe import Markup

Facts = Mapping[str, Any]
_SCALE_FROM = 0.9  # cosines below it are drawn as lost
_MOST_ERROR = 0.5  # a relative error that is drawn as full
_WORST = 5
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 480, 250, 48, 34, 12, 12
_GOOD = ("exact", "minor")
# Bytes of one value of the latent and of the rope key.
_FORMS = (("latent, bf16", 2.0, 2.0), ("latent, int8 and bf16 rope key", 1.0, 2.0),
          ("latent, int4 and bf16 rope key", 0.5, 2.0))  # fmt: skip


def page(report: Facts) -> bytes:
    """The page of a report as `CompressReport.to_dict` tells it."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    loaders = [PackageLoader(name, ".") for name in
               ("mla_deploy.compress", "mla_deploy.validate.outputs")]  # fmt: skip
    environment = Environment(
        loader=ChoiceLoader(loaders), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    views, loss = report["views"], report["loss"]
    worst = _worst_layer(views)
    stripes = list(_stripes(report, worst))
    text = environment.get_template("page.html.jinja").render(
        report=report,
        good=loss["verdict"] in _GOOD,
        headline=f"{100 * report['cache_share']:.0f} % of the cache: {loss['verdict']} loss"
        if loss["verdict"] != "exact" else "Exact: nothing is lost",
        tiles=list(_tiles(report)),
        views=bool(views),
        worst=worst,
        stripes=stripes,
        middle=13 * len(stripes) + 2,
        memory=list(_memory(report)),
        loss=list(_loss(loss)),
        **choice_facts(report),
        **(_drawn(report, worst) if views else {}),
    )  # fmt: skip
    return text.encode("utf-8", "replace")


def _drawn(report: Facts, worst: int) -> dict[str, Any]:
    views = report["views"]
    layer = views[worst]
    return {
        "scale_from": _SCALE_FROM,
        "energy_chart": _energy_chart(views, report["kv_lora_rank"]),
        "maps": [
            ("Keys", [[_cell(c) for c in view["key_cosine"]] for view in views]),
            ("Values", [[_cell(c) for c in view["value_cosine"]] for view in views]),
        ],
        "worst_heads": _worst_heads(views),
        "arrows": [
            ((x, -y), (u, -v), f"{head}") for head, (x, y, u, v) in enumerate(layer["compass"])
        ],
        "angles": [(head, f"{angle:.1f}") for head, angle in enumerate(layer["key_angle"])],
        "alike": [
            [(f"{had:.2f}", f"{got:.2f}") for had, got in zip(*rows, strict=True)]
            for rows in zip(layer["alike"], layer["alike_after"], strict=True)
        ],
        "turning": _turning(report),
    }


def _tiles(report: Facts) -> Iterator[tuple[str, str, str]]:
    loss = report["loss"]
    share = f"{100 * report['cache_share']:.0f} %"
    kind, unit = ("bytes", "bytes a token") if report["cache_dtype"] else ("values", "values")
    sizes = report[f"cached_{kind}"], report[f"cached_{kind}_source"]
    yield "cache", share, f"{sizes[0]:,} of {sizes[1]:,} {unit}"
    told = f"95 %: {loss['kl_low']:.2g} to {loss['kl_high']:.2g}"
    yield "mean KL", f"{loss['mean_kl']:.2g}", told
    yield (
        "perplexity",
        f"x{loss['perplexity_ratio']:.4f}",
        f"{loss['perplexity_source']:.4g} before",
    )
    yield "top-1", f"{loss['top1']:.1%}", f"of {loss['tokens']:,} held-out tokens"


def _worst_layer(views: Sequence[Facts]) -> int:
    errors = [max(*view["key_error"], *view["value_error"]) for view in views]
    return int(np.argmax(errors)) if errors else 0


def _stripes(report: Facts, worst: int) -> Iterator[tuple[str, str, float]]:
    groups = report["source_heads"]["key"]
    view = report["views"][worst] if report["views"] else None
    for kind in ("key", "value"):
        errors = [0.0] * groups if view is None else view[f"{kind}_error"]
        for head, error in enumerate(errors):
            yield f"{kind} {head}", f"{error:.1%}", round(min(error / _MOST_ERROR, 1.0), 3)


def _cell(cosine: float) -> tuple[str, float]:
    lost = (1.0 - cosine) / (1.0 - _SCALE_FROM)
    return f"{cosine:.4f}", round(min(max(lost, 0.0), 1.0), 3)


def _worst_heads(views: Sequence[Facts]) -> list[tuple[str, str, str]]:
    every = [
        (cosine, error, f"layer {index}, {kind} {head}")
        for index, view in enumerate(views)
        for kind in ("key", "value")
        for head, (cosine, error) in enumerate(
            zip(view[f"{kind}_cosine"], view[f"{kind}_error"], strict=True)
        )
    ]
    return [
        (name, f"{cosine:.4f}", f"{error:.1%}") for cosine, error, name in sorted(every)[:_WORST]
    ]


def _turning(report: Facts) -> list[list[tuple[str, float]]]:
    heads = report["source_heads"]
    counts = np.zeros((heads["key"], heads["width"] // 2))
    for view in report["views"]:
        for axis, frequency in view["turning"]:
            counts[axis, frequency] += 1
    most = len(report["views"])
    return [[(f"{int(n)} of {most} layers", round(n / most, 3)) for n in row] for row in counts]


def _memory(report: Facts) -> Iterator[tuple[str, str, str, float]]:
    heads, layers = report["source_heads"], report["layers"]
    full = 2.0 * layers * 2 * heads["query"] * heads["width"]
    rows = [("keys and values of every query head, bf16", full)]
    rows.append(("the source's key and value heads, bf16", 2.0 * report["cached_values_source"]))
    rank, rope = report["kv_lora_rank"], report["qk_rope_head_dim"]
    rows += [(name, layers * (rank * one + rope * other)) for name, one, other in _FORMS]
    for name, size in rows:
        row = byte_text(round(size * 32768))
        yield name, f"{round(size):,} B", row, round(max(100 * size / full, 0.6), 2)


def _loss(loss: Facts) -> Iterator[tuple[str, str]]:
    yield "verdict", loss["verdict"]
    yield "judged on", f"{loss['tokens']:,} tokens of {loss['text']}"
    yield "mean KL", f"{loss['mean_kl']:.4g}"
    yield "its 95 % interval", f"{loss['kl_low']:.4g} to {loss['kl_high']:.4g}"
    yield "99th percentile of KL", f"{loss['p99_kl']:.4g}"
    yield "top-1 agreement", f"{loss['top1']:.2%}"
    yield "perplexity of the source", f"{loss['perplexity_source']:.5g}"
    yield "perplexity now", f"{loss['perplexity']:.5g}"


def _energy_chart(views: Sequence[Facts], rank: int) -> Markup:
    from markupsafe import Markup

    widest = max(view["energy"][-1][0] for view in views)
    chart = ElementTree.Element(
        "svg", {"viewBox": f"0 0 {_WIDTH} {_HEIGHT}", "class": "chart", "role": "img"}
    )
    ElementTree.SubElement(chart, "title").text = "Share of variance kept, by width"

    def x(width: float) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * width / widest, 2)

    def y(share: float) -> float:
        return round(_HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * share, 2)

    def line(kind: str, points: Sequence[tuple[float, float]]) -> None:
        told = " ".join(f"{x(width)},{y(share)}" for width, share in points)
        ElementTree.SubElement(chart, "polyline", {"class": kind, "points": told})

    def label(text: str, at_x: float, at_y: float, anchor: str) -> None:
        placed = {"x": f"{at_x}", "y": f"{at_y}", "text-anchor": anchor}
        ElementTree.SubElement(chart, "text", placed).text = text

    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        ends = {
            "x1": f"{_LEFT}",
            "x2": f"{_WIDTH - _RIGHT}",
            "y1": f"{y(share)}",
            "y2": f"{y(share)}",
        }
        ElementTree.SubElement(chart, "line", {"class": "grid", **ends})
        label(f"{100 * share:.0f} %", _LEFT - 6, y(share) + 4, "end")
    for view in views:
        line("faint", [(0, 0.0), *view["energy"]])
    widths = np.linspace(0, widest, 40)
    for kind, name in (("dashed", "weight_energy"), ("line", "energy")):
        curves = [np.array([(0, 0.0), *view[name]], float) for view in views]
        mean = np.mean([np.interp(widths, curve[:, 0], curve[:, 1]) for curve in curves], 0)
        line(kind, list(zip(widths.tolist(), mean.tolist(), strict=True)))
    ends = {"x1": f"{x(rank)}", "x2": f"{x(rank)}", "y1": f"{y(1)}", "y2": f"{y(0)}"}
    ElementTree.SubElement(chart, "line", {"class": "chosen", **ends})
    label(f"{rank}", x(rank), _HEIGHT - _BOTTOM + 16, "middle")
    label(f"{widest}", x(widest), _HEIGHT - _BOTTOM + 16, "end")
    return Markup(ElementTree.tostring(chart, encoding="unicode"))  # our own elements, escaped
