"""`mla-deploy quantize`: float bundle -> the same bundle with quantised weights."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import click

from mla_deploy.cli.output import Outcome, Screen, byte_text
from mla_deploy.cli.progress import progress_bar
from mla_deploy.cli.verb import choice, verb


@click.command(short_help="Bundle to bundle: weights or cache in fewer bits.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The bundle to write.")
@click.option(
    "--weights",
    metavar="FORM",
    help="int4, int8, fp8, or refined: int4:asymmetric,mixed, int8:block=32,head=keep.  "
    "[as they are]",
)
@choice(
    "--cache-dtype",
    "fp32|fp16|bf16|int8|int8-tile|int8-all|fp8|int4|int4-all",
    "Of the cache; from int8 on latents are codes with scales, of -all rope keys too.  [as it is]",
)
@click.option(
    "--calibrate",
    metavar="TEXT",
    type=click.Path(path_type=Path),
    help="Fit channel scales and rounding to this text; its end is held out to judge by.",
)
@click.option(
    "--rotate-latent",
    is_flag=True,
    help="So that no channel of a latent stands out and takes the codes of the others.",
)
@click.option(
    "--text", type=click.Path(path_type=Path), help="Measure the loss on this.  [a sample]"
)
@click.option("--replace", is_flag=True, default=None, help="Swap out a bundle that is there.")
@verb
def quantize(screen: Screen, bundle: Path, out: Path, **options: Any) -> Outcome:
    """Write BUNDLE to OUT, its weights rounded to --weights, its cache stored as --cache-dtype.

    BUNDLE stays as it is, and so do target and capacity. The loss against BUNDLE is measured on
    text where it has a tokenizer, on random ids where it has none. With --calibrate, channel scales
    are folded into the weights around them (SmoothQuant, AWQ), and rounding makes up for its own
    errors on the inputs that weights meet in a text (GPTQ); each is kept where it serves the text's
    end better.

    int4:mixed keeps kv_a and down, which lose most, in int8. A role on its own: kv_a=int8, o=keep;
    roles are linear, of which q, kv_a, o and down are parts, kv_b, experts, head and embedding.
    """
    from mla_deploy.cli.bundle_sheets import bundle_result, bundle_sheets, weight_words
    from mla_deploy.cli.loss_sheets import loss_sheets, loss_words, quantized

    started = perf_counter()
    with progress_bar(screen) as progress:
        found, loss = quantized(bundle, out, progress=progress, **options)
    seconds = perf_counter() - started
    result = {**bundle_result(found), "quantize_seconds": round(seconds, 3), "loss": loss}
    words = {"cache_dtype": ", cache {}", "rotate_latent": ", latents rotated"}
    told = "".join(told.format(options[n]) for n, told in words.items() if options.get(n))
    forms = f"{weight_words(found)}{told}".removeprefix(", ")
    summary = (
        f"quantised {bundle} to {out} in {seconds:.1f} s: {forms}, "
        f"{byte_text(result['total_bytes'])}{loss_words(loss, found)}"
    )
    return Outcome(summary, result, (*loss_sheets(loss, found), *bundle_sheets(found)))
