"""`mla-deploy quantize`: float bundle -> the same bundle with quantised weights."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import click

from mla_deploy.cli.output import Outcome, Screen, byte_text
from mla_deploy.cli.progress import progress_bar
from mla_deploy.cli.verb import verb


@click.command(short_help="Bundle to bundle: weights of four or eight bits, the loss measured.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The bundle to write.")
@click.option(
    "--weights",
    metavar="FORM",
    required=True,
    help="int4, int8, fp8, or refined: int4:block=128,asymmetric,head=int8.",
)
@click.option(
    "--text", type=click.Path(path_type=Path), help="Measure the loss on this.  [a sample]"
)
@click.option("--replace", is_flag=True, default=None, help="Swap out a bundle that is there.")
@verb
def quantize(screen: Screen, bundle: Path, out: Path, **options: Any) -> Outcome:
    """Round the weights of BUNDLE to --weights and write the bundle OUT; BUNDLE stays as it is.

    Target, cache and capacity stay what they are. The loss against BUNDLE is measured on text where
    it has a tokenizer, on random ids where it has none.
    """
    from mla_deploy.cli.bundle_sheets import bundle_result, bundle_sheets
    from mla_deploy.cli.loss_sheets import loss_sheets, loss_words, quantized

    started = perf_counter()
    with progress_bar(screen) as progress:
        found, loss = quantized(bundle, out, progress=progress, **options)
    seconds = perf_counter() - started
    result = {**bundle_result(found), "quantize_seconds": round(seconds, 3), "loss": loss}
    summary = (
        f"quantised {bundle} to {out} in {seconds:.1f} s: {options['weights']}, "
        f"{byte_text(result['total_bytes'])}{loss_words(loss)}"
    )
    return Outcome(summary, result, (*loss_sheets(loss), *bundle_sheets(found)))
