"""`compress --explain`: of a model that `compress` wrote, or of one with latents of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mla_deploy.cli.output import Outcome, Screen
from mla_deploy.cli.progress import progress_bar


def explained(
    screen: Screen, checkpoint: Path, report: Path | None, options: dict[str, Any]
) -> Outcome:
    """The outcome of the verb. Raises: click's usage error; InputError CMP-*, CFG-*, CKPT-*."""
    from mla_deploy.compress.told import has_report, read_report, write_page

    if has_report(checkpoint):
        from mla_deploy.cli.compress_sheets import compress_sheets, words_of

        if options or report is None:
            raise click.UsageError("of what compress wrote, --explain takes --report and no more")
        told = read_report(checkpoint)
        words, sheets = words_of(told), compress_sheets(told)
    else:
        from mla_deploy.cli.native_sheets import native_sheets, native_words
        from mla_deploy.compress.native import explain_native

        unfit = sorted(set(options) - {"calibrate", "tokens"})
        if unfit:
            raise click.UsageError(f"--{unfit[0].replace('_', '-')} is not of --explain")
        with progress_bar(screen) as progress:
            told = explain_native(checkpoint, progress=progress, **options).to_dict()
        words, sheets = native_words(told), native_sheets(told)
    if report is not None:
        write_page(told, report)
    written = "looked at" if report is None else f"wrote {report} of"
    return Outcome(f"{written} {checkpoint}: {words}", dict(told), sheets)
