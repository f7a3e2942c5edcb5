"""The part of the page that says what a budget chose among, and how wide each layer is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Facts = Mapping[str, Any]
_WIDEST = 360.0  # of a layer's bar, in the units of the drawing


def choice_facts(report: Facts) -> dict[str, Any]:
    """What `choice.html.jinja` shows."""
    weighed = report["weighed"]
    given = report["budget"]
    return {
        "weighed": list(_rows(report)),
        "weighed_tokens": f"{weighed[0]['tokens']:,}" if weighed else "",
        "budget": f"{100 * given:g} %" if given is not None else "",
        "budget_bytes": f"{int(given * report['cached_bytes_source']):,} bytes" if given else "",
        "layer_bars": list(_bars(report["widths"])),
    }


def _rows(report: Facts) -> Iterator[dict[str, Any]]:
    for row in sorted(report["weighed"], key=lambda row: float(row["mean_kl"])):
        yield {
            "name": row["name"],
            "bytes": f"{row['cached_bytes']:,}",
            "share": f"{100 * row['cached_bytes'] / report['cached_bytes_source']:.1f} %",
            "kl": f"{row['mean_kl']:.2g}",
            "interval": f"{row['kl_low']:.2g} to {row['kl_high']:.2g}",
            "perplexity": f"x{row['perplexity_ratio']:.4f}",
            "chosen": row["chosen"],
        }


def _bars(widths: list[list[int]]) -> Iterator[dict[str, Any]]:
    if all(each == widths[0] for each in widths):
        return
    widest = max(map(sum, widths))
    for rank, rope in widths:
        yield {
            "latent": round(_WIDEST * rank / widest, 1),
            "rope": round(_WIDEST * rope / widest, 1),
            "told": f"{rank} + {rope}",
        }
