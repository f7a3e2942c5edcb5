"""`mla-deploy export`: checkpoint -> bundle."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import click

from mla_deploy.cli.output import Outcome, Screen, byte_text
from mla_deploy.cli.progress import progress_bar
from mla_deploy.cli.verb import choice, verb


@click.command(short_help="Checkpoint to bundle: ONNX graphs over the latent cache.")
@click.argument("checkpoint", type=click.Path(path_type=Path), required=False)
@click.option("--module", metavar="FILE:FACTORY", help="Your own torch.nn.Module instead.")
@click.option("--out", type=click.Path(path_type=Path), help="The bundle to write.")
@click.option(
    "--in-place",
    is_flag=True,
    default=None,
    help="Instead of --out: graphs beside the checkpoint, weights left where they are.",
)
@click.option("--target", help="What it will run on.  [cpu]")
@choice(
    "--dtype",
    "fp32|fp16|bf16",
    "Storage of weights and cache.  [fp32; TensorRT: fp16; in place, kept: as they are]",
)
@click.option(
    "--weights",
    metavar="FORM|keep|FILE",
    help="int4, int8, fp8, or refined as int4:asymmetric,mixed: quantise them, and measure the "
    "loss; keep: as the checkpoint stores them; of --module: its file.  [converted to --dtype]",
)
@choice("--cache", "in-place|growing", "Bound buffer, or one that grows at each step.  [in-place]")
@choice("--cache-layout", "fused|split", "Latent and rope key in one tensor, or in two.  [fused]")
@choice(
    "--cache-dtype",
    "fp32|fp16|bf16|int8|int8-tile|int8-all|int8-static|fp8|int4|int4-all",
    "Of the cache alone; from int8 on codes with scales, of -all rope keys too; -static: TensorRT, "
    "scales found on --calibrate or a sample.  [latent_cache_dtype of config.json, else --dtype]",
)
@click.option("--calibrate", metavar="TEXT", help="Fit --weights, static scales, to this text.")
@click.option("--rotate-latent", is_flag=True, help="So that no channel of a latent stands out.")
@click.option("--capacity", type=int, help="Tokens a row reserves by default.")
@click.option("--all-logits", is_flag=True, default=None, help="Logits of every new token.")
@click.option("--replace", is_flag=True, default=None, help="Swap out a bundle that is there.")
@verb
def export(
    screen: Screen, checkpoint: Path | None = None, out: Path | None = None, **options: Any
) -> Outcome:
    """Export CHECKPOINT, a Hugging Face folder with latent attention, to the bundle OUT.

    Two ONNX graphs over one weight file: prefill expanded, decode absorbed. The latent cache is an
    input and output of both. Nothing stands under OUT until all is written.
    With --module the model is what a function of yours, package.file:factory, returns; this runs
    your code. With --in-place the bundle is CHECKPOINT's folder and a few files mla-deploy.* added.
    """
    if (out is None) != bool(options.get("in_place")):
        raise click.UsageError("one of --out and --in-place is needed.")
    if (checkpoint is None) != bool(options.get("module")):
        raise click.UsageError("one of CHECKPOINT and --module is needed.")
    import mla_deploy
    from mla_deploy.cli.bundle_sheets import bundle_result, bundle_sheets, stored_words
    from mla_deploy.cli.loss_sheets import loss_of, loss_sheets, loss_words

    started = perf_counter()
    with progress_bar(screen) as report:
        bundle = mla_deploy.export(checkpoint, out, progress=report, **options)
        seconds = perf_counter() - started
        loss = loss_of(bundle, checkpoint, progress=report)
    result = {**bundle_result(bundle), "export_seconds": round(seconds, 3), "loss": loss}
    model, size = result["model"]["model_type"], byte_text(result["total_bytes"])
    summary = f"exported {model} to {out or checkpoint} in {seconds:.1f} s: "
    summary += f"{result['target']}, {stored_words(bundle)}, {size}{loss_words(loss, bundle)}"
    return Outcome(summary, result, (*loss_sheets(loss, bundle), *bundle_sheets(bundle)))
