"""The report of a native model as one HTML page: inline SVG, nothing fetched, no script."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mla_deploy.compress.native.draw import energy_chart, head_map, loss_chart
from mla_deploy.compress.page_layers import SCALE_FROM, cosine_cell
from mla_deploy.shapes import byte_text
from mla_deploy.validate.outputs.html_page import page_environment

Facts = Mapping[str, Any]
_TEMPLATES = ("mla_deploy.compress.native", "mla_deploy.compress")
_ROW = 32_768  # tokens of a row whose cache is told
_MOST_MAPS = 6  # layers whose heads are drawn
_BROKEN = "broken"  # the best of what is broken is no use


def native_page(report: Facts) -> bytes:
    """The page of a report as `NativeReport.to_dict` tells it."""
    sites, forms = report["sites"], report["forms"]
    measured = report["text"] is not None
    best = next((row for row in forms if row["name"] == report["smallest_exported"]), None)
    judged = forms[0]["loss"]["tokens"] if measured else 0
    text = (
        page_environment(*_TEMPLATES)
        .get_template("native.html.jinja")
        .render(
            report=report,
            measured=measured,
            good=not measured or best is not None,
            headline=_headline(report, best),
            advice=_advice(report, best),
            tiles=list(_tiles(report, best)),
            judged=f"{judged:,}",
            matrices=_matrices(sites),
            layers=[_layer(site) for site in sites],
            energy=energy_chart([site for site in sites if _is_drawn(site, measured)]),
            maps=[_maps(site, measured) for site in _chosen(sites)],
            lost=_lost(sites),
            scale_from=SCALE_FROM,
            curves=loss_chart(forms) if measured else None,
            forms=[_form(row, report) for row in forms],
            memory=[_memory(row, forms) for row in forms if row["basis"] == "plain"],
        )
    )
    return text.encode("utf-8", "replace")


def _is_drawn(site: Facts, measured: bool) -> bool:
    return not measured or site["on_text"] is not None


def _headline(report: Facts, best: Facts | None) -> str:
    if report["text"] is None:
        return "Weights alone: nothing was measured"
    if best is None:
        return "No smaller latent without a visible loss"
    return (
        f"{best['name']}: {100 * best['share']:.0f} % of the cache, {best['loss']['verdict']} loss"
    )


def _advice(report: Facts, best: Facts | None) -> list[str]:
    """What the numbers say, in sentences."""
    if report["text"] is None:
        return []
    said = []
    if best is not None:
        said.append(
            f"The smallest form that export writes and that loses little is {best['name']}: "
            f"{best['token_bytes']:,} bytes a token (export {best['export']})."
        )
    by_name = {row["name"]: row for row in report["forms"]}
    for size, name in sorted(report["least_at"].items(), key=lambda item: -int(item[0])):
        rivals = [row for row in report["forms"] if row["token_bytes"] == int(size)]
        if len(rivals) < 2:
            continue
        least = by_name[name]
        alike = [
            row["name"]
            for row in rivals
            if row is not least and row["loss"]["kl_low"] <= least["loss"]["kl_high"]
        ]
        told = f"At {int(size):,} bytes {name} loses least (mean KL {least['loss']['mean_kl']:.2g})"
        said.append(f"{told}; within its interval: {', '.join(alike)}." if alike else f"{told}.")
    return said


def _tiles(report: Facts, best: Facts | None) -> Iterator[tuple[str, str, str]]:
    forms, sites = report["forms"], report["sites"]
    whole = max(row["token_bytes"] for row in forms)
    yield "a token's cache", f"{whole:,} B", f"16 bits, {len(sites)} latent attentions"
    ratio = sum(site["ratio"] for site in sites) / len(sites)
    yield "heads to latent", f"{ratio:.1f} to 1", "values of all heads to those of the latent"
    seen = [site["on_text"] for site in sites if site["on_text"] is not None]
    if seen:
        used = sum(each["effective_rank"] for each in seen) / len(seen)
        ranks = {site["rank"] for site in sites}
        yield (
            "effective rank",
            f"{used:.0f}",
            f"of {', '.join(map(str, sorted(ranks)))}, on average",
        )
    if best is not None:
        loss = best["loss"]
        told = f"95 %: {loss['kl_low']:.2g} to {loss['kl_high']:.2g}"
        yield f"mean KL, {best['name']}", f"{loss['mean_kl']:.2g}", told


def _matrices(sites: Sequence[Facts]) -> list[dict[str, Any]]:
    """One drawing for each shape: kv_a [D, L] and kv_b [L, H (N + V)], to scale along the sides."""
    shapes: dict[tuple[int, ...], int] = {}
    for site in sites:
        key = tuple(site[name] for name in ("width", "rank", "rope", "heads", "nope", "value"))
        shapes[key] = shapes.get(key, 0) + 1
    drawn = []
    for (width, rank, rope, heads, nope, value), count in shapes.items():
        wide = heads * (nope + value)
        scale = min(340 / wide, 140 / width)
        drawn.append(
            {
                "count": count,
                "width": width,
                "rank": rank,
                "rope": rope,
                "heads": heads,
                "nope": nope,
                "value": value,
                "wide": wide,
                "ratio": f"{wide / rank:.1f}",
                "d": round(max(width * scale, 8), 1),
                "l": round(max(rank * scale, 8), 1),
                "w": round(max(wide * scale, 8), 1),
                "step": round(max(wide * scale, 8) / heads, 3),
                "key_part": round(max(wide * scale, 8) / heads * nope / (nope + value), 3),
                "lines": heads if heads <= 48 else 0,
            }
        )
    return drawn


def _layer(site: Facts) -> list[str]:
    seen = site["on_text"]
    row = [_short(site["path"]), f"{site['rank']}", f"{site['weights_rank']:.1f}"]
    if seen is None:
        row += ["-", "-", "-"]
    else:
        row += [f"{seen[name]:.1f}" for name in ("effective_rank", "readers_rank", "channel_peak")]
    keys = site["weight_keys"] if seen is None else seen["keys"]
    values = site["weight_values"] if seen is None else seen["values"]
    for each in (keys, values):
        first, second = each["pair"]
        row.append(f"{each['cosine_mean']:.2f}")
        row.append(f"{each['cosine_most']:.2f} ({first}, {second})")
        row.append(f"{each['shared_mean']:.2f}")
    return row


def _short(path: str) -> str:
    return path.removeprefix("model.").removesuffix(".self_attn")


def _chosen(sites: Sequence[Facts]) -> list[Facts]:
    """A few layers, from all over."""
    if len(sites) <= _MOST_MAPS:
        return list(sites)
    last = len(sites) - 1
    return [sites[round(i * last / (_MOST_MAPS - 1))] for i in range(_MOST_MAPS)]


def _maps(site: Facts, measured: bool) -> dict[str, Any]:
    seen = site["on_text"] if measured else None
    kinds = [("W_uk", site["weight_keys"]), ("W_uv", site["weight_values"])]
    if seen is not None:
        kinds += [("keys on the text", seen["keys"]), ("values on the text", seen["values"])]
    figures = [
        (f"{name}, {what}", head_map(each[what]))
        for what in ("cosine", "shared")
        for name, each in kinds
    ]
    return {"name": _short(site["path"]), "figures": figures, "group": kinds[0][1]["group"]}


def _lost(sites: Sequence[Facts]) -> list[tuple[str, list[tuple[str, list[tuple[str, float]]]]]]:
    """Per kind: of each layer, what is left of each head when half the rank is cut."""
    found = []
    for title, name in (("Keys", "half_key_cosine"), ("Values", "half_value_cosine")):
        rows = [
            (
                _short(site["path"]).removeprefix("layers."),
                [cosine_cell(c) for c in site["on_text"][name]],
            )
            for site in sites
            if site["on_text"] is not None
        ]
        if rows:
            found.append((title, rows))
    return found


def _form(row: Facts, report: Facts) -> dict[str, Any]:
    loss = row["loss"]
    told = {
        "name": row["name"],
        "bytes": f"{row['token_bytes']:,}",
        "share": f"{100 * row['share']:.0f} %",
        "how": row["export"] or ("folds" if row["cost"] == "nothing" else "one product a token"),
        "is_option": bool(row["export"]),
        "best": row["name"] in report["frontier"] and loss["verdict"] != _BROKEN,
    }
    if loss is None:
        return {**told, "loss": None}
    return {
        **told,
        "loss": f"{loss['mean_kl']:.2g}",
        "interval": f"{loss['kl_low']:.2g} to {loss['kl_high']:.2g}",
        "top1": f"{loss['top1']:.2%}",
        "perplexity": f"x{loss['perplexity_ratio']:.4f}",
        "verdict": loss["verdict"],
    }


def _memory(row: Facts, forms: Sequence[Facts]) -> tuple[str, str, str, float]:
    whole = max(each["token_bytes"] for each in forms)
    size = row["token_bytes"]
    told = byte_text(size * _ROW)
    return row["name"], f"{size:,} B", told, round(max(100 * size / max(whole, 1), 0.6), 2)
