"""What quantised weights and caches cost, as a table and in a few words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mla_deploy.cli.calibration_sheets import calibration_sheets, calibration_words
from mla_deploy.cli.output import Sheet
from mla_deploy.cli.signals import standing
from mla_deploy.errors import quoted


def loss_of(bundle: Any, source: Path | None, **options: Any) -> dict[str, Any] | None:
    """Measured against a checkpoint, for a bundle that is quantised; None for any other."""
    manifest = bundle.manifest
    is_quantized = "quantized" in manifest["weights"] or "store" in manifest["cache"]
    if source is None or not is_quantized:
        return None
    from mla_deploy.checkpoint import open_checkpoint
    from mla_deploy.validate.loss_check import measure_loss

    with standing(_whole(bundle)), open_checkpoint(source) as checkpoint:
        return measure_loss(bundle, checkpoint, **options)


def quantized(
    bundle: Path, out: Path, text: Path | None = None, *, progress: Any, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """The new bundle, and its loss against the float one on the text of a file."""
    from mla_deploy.bundle import open_bundle
    from mla_deploy.export.requantize import quantize
    from mla_deploy.text_file import read_text_file
    from mla_deploy.validate.loss import text_rows
    from mla_deploy.validate.loss_check import measure_loss

    words = None if text is None else read_text_file(text)
    source = open_bundle(bundle)
    if words is not None:
        text_rows(source, words)  # refused before anything is written
    found = quantize(source, out, progress=progress, **options)
    with standing(_whole(found)):
        return found, measure_loss(found, source, text=words, progress=progress)


def _whole(bundle: Any) -> str:
    return f"{quoted(str(bundle.path))} was written and is whole; its loss was not measured"


def loss_words(loss: dict[str, Any] | None, bundle: Any = None) -> str:
    """For a summary line, that of calibrating `bundle` first; empty without either."""
    fitted = calibration_words(bundle)
    if loss is None:
        return fitted
    if "skipped" in loss:
        return f"{fitted}; loss not measured: {loss['skipped']}"
    ratio = loss["perplexity_ratio"]
    perplexity = "" if ratio is None else f", perplexity x{ratio:.4f}"
    same = f"mean KL {loss['mean_kl']:.2g}, top-1 {loss['top1']:.1%}"
    return f"{fitted}; loss on {loss['on']}: {same}{perplexity}"


def loss_sheets(loss: dict[str, Any] | None, bundle: Any = None) -> tuple[Sheet, ...]:
    """That of calibrating `bundle` first; none where nothing was measured."""
    fitted = calibration_sheets(bundle)
    if loss is None or "skipped" in loss:
        return fitted
    gates = loss["gates"] or {}
    names = (("mean_kl", "mean KL"), ("top1", "top-1"), ("perplexity_ratio", "perplexity ratio"))
    rows = [(told, _number(loss[name]), _number(gates.get(name))) for name, told in names]
    title = f"Loss against the float source, {loss['positions']:,} positions of {loss['on']}"
    sheet = Sheet(title, ("what", "#measured", "#gate"), rows)
    failed = [(told,) for told in loss["failures"]]
    return (*fitted, sheet, *([Sheet("Gates not met", ("",), failed)] if failed else []))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
