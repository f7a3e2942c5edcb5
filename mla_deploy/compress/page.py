"""The report of `compress` as one HTML page: verdict, matrices, directions, memory, loss.

Everything in it is in compress.json too. Nothing is fetched and nothing runs; colours and layout
are those of the report of `validate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mla_deploy.compress.choice_page import choice_facts
from mla_deploy.compress.page_chart import Chart, energy_axes, mean_curve
from mla_deploy.compress.page_layers import layer_facts, share_text
from mla_deploy.compress.page_rooms import room_facts
from mla_deploy.validate.outputs.html_page import page_environment

Facts = Mapping[str, Any]
_MOST_ERROR = 0.5  # a relative error that is drawn as full
_GOOD = ("exact", "minor")


def page(report: Facts) -> bytes:
    """The page of a report as `CompressReport.to_dict` tells it."""
    views, loss = report["views"], report["loss"]
    worst = _worst_layer(views)
    stripes = list(_stripes(report, worst))
    text = page_environment("mla_deploy.compress").get_template("page.html.jinja").render(
        report=report,
        good=loss["verdict"] in _GOOD,
        headline=f"{100 * report['cache_share']:.0f} % of the cache: {loss['verdict']} loss"
        if loss["verdict"] != "exact" else "Exact: nothing is lost",
        tiles=list(_tiles(report)),
        worst=worst,
        stripes=stripes,
        middle=13 * len(stripes) + 2,
        layer_widths=report["widths"][worst],
        loss=list(_loss(report)),
        **choice_facts(report),
        **layer_facts(report),
        **room_facts(report),
        **_drawn(report, worst),
    )  # fmt: skip
    return text.encode("utf-8", "replace")


def _drawn(report: Facts, worst: int) -> dict[str, Any]:
    views = report["views"]
    layer = views[worst]
    return {
        "energy_chart": _energy_chart(
            views, report["kv_lora_rank"], is_exact=report["method"] == "exact"
        ).drawn(),
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
    return int(np.argmax(errors))


def _stripes(report: Facts, worst: int) -> Iterator[tuple[str, str, float]]:
    view = report["views"][worst]
    for kind in ("key", "value"):
        for head, error in enumerate(view[f"{kind}_error"]):
            yield f"{kind} {head}", share_text(error), round(min(error / _MOST_ERROR, 1.0), 3)


def _turning(report: Facts) -> list[list[tuple[str, float]]]:
    heads = report["source_heads"]
    counts = np.zeros((heads["key"], heads["width"] // 2))
    for view in report["views"]:
        for axis, frequency in view["turning"]:
            counts[axis, frequency] += 1
    most = len(report["views"])
    return [[(f"{int(n)} of {most} layers", round(n / most, 3)) for n in row] for row in counts]


def _loss(report: Facts) -> Iterator[tuple[str, str]]:
    loss, outputs = report["loss"], report["outputs"]
    yield "verdict", loss["verdict"]
    yield "judged on", f"{loss['tokens']:,} tokens of {loss['text']}"
    yield "mean KL", f"{loss['mean_kl']:.4g}"
    yield "its 95 % interval", f"{loss['kl_low']:.4g} to {loss['kl_high']:.4g}"
    yield "99th percentile of KL", f"{loss['p99_kl']:.4g}"
    yield "top-1 agreement", f"{loss['top1']:.2%}"
    worst = max(range(len(outputs)), key=lambda index: float(outputs[index]["attention_error"]))
    error = share_text(outputs[worst]["attention_error"])
    yield "worst layer, error of its attention", f"layer {worst}, {error}"
    yield "perplexity of the source", f"{loss['perplexity_source']:.5g}"
    yield "perplexity now", f"{loss['perplexity']:.5g}"
    for name, other in report["beside"].items():
        yield f"mean KL, {name} layout", f"{other['mean_kl']:.4g}"


def _energy_chart(views: Sequence[Facts], rank: int, *, is_exact: bool) -> Chart:
    widest = max(view["energy"][-1][0] for view in views)
    chart = energy_axes("Share of variance kept, by width", widest, axis="width of the latent")
    for place in sorted({0, widest, *([] if is_exact or rank > 0.92 * widest else [rank])}):
        chart.below(place, f"{place}")
    for view in views:
        chart.line("faint", [(0, 0.0), *view["energy"]])
    for kind, name in (("dashed", "weight_energy"), ("line", "energy")):
        chart.line(kind, mean_curve([view[name] for view in views], widest))
    if not is_exact:
        chart.upright("chosen", rank)
    return chart
