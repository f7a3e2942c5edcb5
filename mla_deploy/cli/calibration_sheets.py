"""What calibrating on a text brought, as a table and in a few words."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

from mla_deploy.cli.output import Sheet


def calibration_words(bundle: Any) -> str:
    """For a summary line; empty for a bundle that was not calibrated."""
    found = _calibration(bundle)
    if found is None:
        return ""
    kept = found["kept"]
    nearest = found["nearest"]["mean_kl"]
    if kept == "nearest":
        tried = (found[name] for name in ("scaled", "calibrated") if name in found)
        best = min(tried, key=itemgetter("mean_kl"))
        told = f"held-out mean KL {best['mean_kl']:.2g}, {nearest:.2g} to nearest"
        told += f"; perplexity {best['perplexity']:.4g}, {found['nearest']['perplexity']:.4g}"
        return f"; rounded to nearest, for calibrating served the held-out text no better: {told}"
    told = f"held-out mean KL {found[kept]['mean_kl']:.2g}, {nearest:.2g} to nearest"
    scaled = f", channels of {found['scales']['groups']} inputs scaled" if _scaled_by(found) else ""
    if kept == "scaled":
        scaled = f"{scaled}, rounded to nearest"
    return f"; calibrated on {found['tokens']:,} tokens{scaled}: {told}"


def calibration_sheets(bundle: Any) -> tuple[Sheet, ...]:
    """None for a bundle that was not calibrated."""
    found = _calibration(bundle)
    if found is None:
        return ()
    scales = "channels scaled, " if _scaled_by(found) else ""
    told = {
        "nearest": "rounded to nearest",
        "scaled": "channels scaled, rounded to nearest",
        "calibrated": f"{scales}rounding fitted",
    }
    rows = [
        ("source", "-", f"{found['source_perplexity']:.4f}", ""),
        *(
            (
                told[name],
                f"{found[name]['mean_kl']:.4g}",
                f"{found[name]['perplexity']:.4f}",
                "kept" if found["kept"] == name else "",
            )
            for name in told
            if name in found
        ),
    ]
    title = (
        f"Calibrated on {found['tokens']:,} tokens, judged on {found['held_out_tokens']:,} "
        f"others: {found['weights']:,} weights fitted"
    )
    if "scaled" in found:
        title += f", channels of {found['scales']['groups']} inputs scaled"
    elif "scales" in found:
        title += ", channel scales left, for the source's logits moved with them"
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


def _scaled_by(found: dict[str, Any]) -> dict[str, str]:
    """Empty where no channel scale is kept."""
    scaled: dict[str, str] = found.get("scaled_by", {})
    return scaled
