"""The report of a native MLA model as tables and in a few words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mla_deploy.cli.output import Sheet

Facts = Mapping[str, Any]


def native_words(report: Facts) -> str:
    """For the summary line."""
    layers = f"{len(report['sites'])} latent attentions"
    if report["text"] is None:
        return f"{layers}, weights alone: nothing was measured"
    best = next((r for r in report["forms"] if r["name"] == report["smallest_exported"]), None)
    if best is None:
        return f"{layers}; no form that export writes has a minor loss"
    loss = best["loss"]
    return (
        f"{layers}; {best['name']} takes {100 * best['share']:.0f} % of the cache at mean KL "
        f"{loss['mean_kl']:.2g}: {loss['verdict']}"
    )


def native_sheets(report: Facts) -> tuple[Sheet, ...]:
    """Forms by bytes, layers, notes."""
    sheets = [_forms(report), _layers(report["sites"])]
    if report["notes"]:
        sheets.append(Sheet("Notes", ("",), [(note,) for note in report["notes"]]))
    return tuple(sheets)


def _forms(report: Facts) -> Sheet:
    rows = list(_form_rows(report))
    if report["text"] is None:
        return Sheet("Forms of the latent", ("form", "#bytes", "#share"), rows)
    judged = report["forms"][0]["loss"]["tokens"]
    title = (
        f"Forms of the latent, on {judged:,} held-out tokens of {report['text']}; * nothing as "
        "small loses less; + one product for each new token"
    )
    columns = ("form", "#bytes", "#share", "#mean KL", "#95 %", "#top-1", "#ppl", "verdict")
    return Sheet(title, columns, rows)


def _form_rows(report: Facts) -> Iterator[tuple[str, ...]]:
    for row in report["forms"]:
        name = row["name"] if row["cost"] == "nothing" else f"{row['name']} +"
        sizes = (name, f"{row['token_bytes']:,}", f"{100 * row['share']:.0f} %")
        loss = row["loss"]
        if loss is None:
            yield sizes
            continue
        is_broken = loss["verdict"] == "broken"  # the best of those is no use
        yield (
            f"* {name}" if row["name"] in report["frontier"] and not is_broken else f"  {name}",
            *sizes[1:],
            f"{loss['mean_kl']:.1e}",
            f"{loss['kl_low']:.0e} {loss['kl_high']:.0e}",
            f"{loss['top1']:.1%}",
            f"x{loss['perplexity_ratio']:.4f}",
            str(loss["verdict"]),
        )


def _layers(sites: Sequence[Facts]) -> Sheet:
    rows = [
        (
            site["path"].removeprefix("model.").removesuffix(".self_attn"),
            f"{site['width']} x {site['rank']}",
            f"{site['ratio']:.1f}",
            f"{site['weights_rank']:.0f}",
            *_on_text(site),
        )
        for site in sites
    ]
    columns = (
        "layer",
        "#D x L",
        "#to 1",
        "#rank W",
        "#rank c",
        "#as read",
        "#key cos",
        "#value cos",
    )
    return Sheet("What each latent holds", columns, rows)


def _on_text(site: Facts) -> tuple[str, str, str, str]:
    seen = site["on_text"]
    if seen is None:
        return (
            "-",
            "-",
            f"{site['weight_keys']['cosine_mean']:.2f}",
            (f"{site['weight_values']['cosine_mean']:.2f}"),
        )
    return (
        f"{seen['effective_rank']:.0f}",
        f"{seen['readers_rank']:.0f}",
        f"{seen['keys']['cosine_mean']:.2f}",
        f"{seen['values']['cosine_mean']:.2f}",
    )
