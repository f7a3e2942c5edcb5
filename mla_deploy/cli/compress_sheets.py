"""What compressing did, as tables and in a few words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mla_deploy.cli.output import Sheet


def words_of(report: Mapping[str, Any]) -> str:
    """For the summary line."""
    loss = report["loss"]
    share = 100 * report["cache_share"]
    return f"{share:.0f} % of the cache, mean KL {loss['mean_kl']:.2g}: {loss['verdict']}"


def compress_sheets(report: Mapping[str, Any]) -> tuple[Sheet, ...]:
    """Sizes, the loss on held-out text, and notes."""
    loss = report["loss"]
    sizes = [
        ("method", str(report["method"])),
        ("layout", str(report["layout"])),
        ("latent L", f"{report['kv_lora_rank']}"),
        ("rope key R", f"{report['qk_rope_head_dim']}"),
        ("cached values a token", f"{report['cached_values']:,}"),
        ("the source's", f"{report['cached_values_source']:,}"),
    ]
    if report["views"]:
        worst = min(min(view["value_cosine"]) for view in report["views"])
        sizes.append(("cosine of the worst value head", f"{worst:.4f}"))
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
    notes = (
        [Sheet("Notes", ("",), [(note,) for note in report["notes"]])] if report["notes"] else []
    )
    return (Sheet("Compressed", columns, sizes), Sheet(title, columns, rows), *notes)
