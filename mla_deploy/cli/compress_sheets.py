"""What compressing did, as tables and in a few words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mla_deploy.cli.output import Sheet


def words_of(report: Mapping[str, Any]) -> str:
    """For the summary line."""
    loss = report["loss"]
    share = 100 * report["cache_share"]
    chosen = [row["name"] for row in report["weighed"] if row["chosen"]]
    form = f" ({chosen[0]})" if chosen else ""
    return f"{share:.0f} % of the cache{form}, mean KL {loss['mean_kl']:.2g}: {loss['verdict']}"


def compress_sheets(report: Mapping[str, Any]) -> tuple[Sheet, ...]:
    """Sizes, the loss on held-out text, and notes."""
    loss = report["loss"]
    sizes = [
        ("method", str(report["method"])),
        ("layout", str(report["layout"])),
        ("latent L", _span([width[0] for width in report["widths"]])),
        ("rope key R", _span([width[1] for width in report["widths"]])),
        ("cached values a token", f"{report['cached_values']:,}"),
        ("the source's", f"{report['cached_values_source']:,}"),
        *_stored(report),
    ]
    sizes += _worst(report)
    rows = [
        ("verdict", str(loss["verdict"])),
        ("mean KL", f"{loss['mean_kl']:.3g}"),
        ("its 95 % interval", f"{loss['kl_low']:.3g} to {loss['kl_high']:.3g}"),
        ("p99 KL", f"{loss['p99_kl']:.3g}"),
        ("top-1 agreement", f"{loss['top1']:.2%}"),
        ("perplexity, source", f"{loss['perplexity_source']:.5g}"),
        ("perplexity, compressed", f"{loss['perplexity']:.5g}"),
    ]
    for name, other in report["beside"].items():
        rows.append((f"mean KL, {name} layout", f"{other['mean_kl']:.3g}"))
        rows.append((f"perplexity, {name} layout", f"{other['perplexity']:.5g}"))
    columns = ("what", "#value")
    title = f"Loss on {loss['tokens']:,} held-out tokens of {loss['text']}"
    if report["cache_dtype"] is not None:
        title += f", cache rounded as {report['cache_dtype']}"
    notes = (
        [Sheet("Notes", ("",), [(note,) for note in report["notes"]])] if report["notes"] else []
    )
    weighed = [_weighed(report)] if report["weighed"] else []
    return (*weighed, Sheet("Compressed", columns, sizes), Sheet(title, columns, rows), *notes)


def _worst(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The head of each kind that keeps least of its direction; the layer furthest off."""
    kinds = {
        "key": [view["key_cosine"] for view in report["views"]],
        "value": [view["value_cosine"] for view in report["views"]],
        "output": [each["cosine"] for each in report["outputs"]],
    }
    rows = []
    for kind, layers in kinds.items():
        cosine, layer, head = min(
            (cosine, layer, head)
            for layer, heads in enumerate(layers)
            for head, cosine in enumerate(heads)
        )
        rows.append((f"worst {kind} head, its cosine", f"layer {layer}, head {head}: {cosine:.4f}"))
    errors = [float(each["attention_error"]) for each in report["outputs"]]
    worst = max(range(len(errors)), key=errors.__getitem__)
    rows.append(("worst layer, its attention's error", f"layer {worst}: {errors[worst]:.2g}"))
    return rows


def _span(widths: list[int]) -> str:
    least, most = min(widths), max(widths)
    return f"{least}" if least == most else f"{least} to {most}, by layer"


def _stored(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    if report["cache_dtype"] is None:
        return []
    return [
        ("cache stored as", str(report["cache_dtype"])),
        ("cached bytes a token", f"{report['cached_bytes']:,}"),
        ("the source's, 16 bits", f"{report['cached_bytes_source']:,}"),
    ]


def _weighed(report: Mapping[str, Any]) -> Sheet:
    rows = sorted(report["weighed"], key=lambda row: float(row["mean_kl"]))
    title = f"Weighed for {100 * report['budget']:g} % on {rows[0]['tokens']:,} other tokens"
    return Sheet(
        title,
        ("form", "#bytes", "#share", "#mean KL", ""),
        [
            (
                row["name"],
                f"{row['cached_bytes']:,}",
                f"{100 * row['cached_bytes'] / report['cached_bytes_source']:.1f} %",
                f"{row['mean_kl']:.2g}",
                "written" if row["chosen"] else "rejected",
            )
            for row in rows
        ],
    )
