"""What compressing did, as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mla_deploy.cli.output import Sheet

if TYPE_CHECKING:
    from mla_deploy.compress import CompressReport


def compress_sheets(report: CompressReport) -> tuple[Sheet, ...]:
    """Sizes, the loss on held-out text, and notes."""
    sizes = [
        ("method", report.method),
        ("latent L", f"{report.rank}"),
        ("rope key R", f"{report.rope}"),
        ("cached values a token", f"{report.cached_values:,}"),
        ("the source's", f"{report.cached_values_source:,}"),
        ("energy kept, worst layer", f"{min(report.energy):.4f}"),
    ]
    sheets = [Sheet("Compressed", ("what", "#value"), sizes)]
    loss = report.loss
    if loss is not None:
        rows = [
            ("verdict", loss.verdict),
            ("mean KL", f"{loss.mean_kl:.3g}"),
            ("its 95 % interval", f"{loss.kl_low:.3g} to {loss.kl_high:.3g}"),
            ("p99 KL", f"{loss.p99_kl:.3g}"),
            ("top-1 agreement", f"{loss.top1:.2%}"),
            ("perplexity, source", f"{loss.perplexity_source:.5g}"),
            ("perplexity, compressed", f"{loss.perplexity:.5g}"),
        ]
        sheets.append(Sheet(f"Loss on {loss.tokens:,} held-out tokens of {loss.text}",
                            ("what", "#value"), rows))  # fmt: skip
    if report.notes:
        sheets.append(Sheet("Notes", ("",), [(note,) for note in report.notes]))
    return tuple(sheets)
