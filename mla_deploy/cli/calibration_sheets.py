"""What fitting the rounding to a text brought, as a table and in a few words."""

from __future__ import annotations

from typing import Any

from mla_deploy.cli.output import Sheet


def calibration_words(bundle: Any) -> str:
    """For a summary line; empty for a bundle that was not calibrated."""
    found = _calibration(bundle)
    if found is None:
        return ""
    before, after = (found[name]["mean_kl"] for name in ("nearest", "calibrated"))
    told = f"held-out mean KL {after:.2g}, {before:.2g} to nearest"
    if found["kept"] == "calibrated":
        return f"; calibrated on {found['tokens']:,} tokens: {told}"
    return f"; rounded to nearest, for calibrating served the held-out text no better: {told}"


def calibration_sheets(bundle: Any) -> tuple[Sheet, ...]:
    """None for a bundle that was not calibrated."""
    found = _calibration(bundle)
    if found is None:
        return ()
    rows = [
        ("source", "-", f"{found['source_perplexity']:.4f}", ""),
        *(
            (
                told,
                f"{found[name]['mean_kl']:.4g}",
                f"{found[name]['perplexity']:.4f}",
                "kept" if found["kept"] == name else "",
            )
            for name, told in (("nearest", "rounded to nearest"), ("calibrated", "calibrated"))
        ),
    ]
    title = (
        f"Rounding fitted to {found['tokens']:,} tokens, judged on {found['held_out_tokens']:,} "
        f"others: {found['weights']:,} weights fitted"
    )
    if found["unseen"]:
        title += f", {found['unseen']:,} that met too few tokens rounded to nearest"
    return (Sheet(title, ("weights", "#mean KL", "#perplexity", ""), rows),)


def _calibration(bundle: Any) -> dict[str, Any] | None:
    if bundle is None:
        return None
    found: dict[str, Any] | None = (
        bundle.manifest["weights"].get("quantized", {}).get("calibration")
    )
    return found
