"""`mla-deploy compress`: an ordinary attention model to one with latent attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mla_deploy.cli.output import Outcome, Screen
from mla_deploy.cli.progress import progress_bar
from mla_deploy.cli.verb import choice, verb


@click.command(short_help="Ordinary attention to latent attention.")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--rank", type=int, help="Width of the latent.  [all: exact]")
@click.option("--rope-dim", type=int, help="Values of keys that keep turning.  [all: exact]")
@choice("--method", "low-rank|transmla", "How ranks are cut.  [low-rank]")
@click.option("--calibrate", type=click.Path(path_type=Path), help="Text to learn from.  [sample]")
@click.option("--context", type=int, help="Longest context it is for.  [the model's]")
@choice("--dtype", "fp32|fp16|bf16", "Of the weights written.  [fp32]")
@verb
def compress(screen: Screen, checkpoint: Path, out: Path, **options: Any) -> Outcome:
    """Write CHECKPOINT, a Llama-like model, to OUT with multi-head latent attention.

    CHECKPOINT is a folder of safetensors or a GGUF file. Without --rank and --rope-dim nothing is
    lost and the cache stays as large. With them the text's first part is learnt from, its last part
    judges the loss. OUT is a checkpoint that `export` takes.
    """
    from mla_deploy.cli.compress_sheets import compress_sheets
    from mla_deploy.compress import compress as made

    with progress_bar(screen) as progress:
        report = made(checkpoint, out, progress=progress, **options)
    share = report.cached_values / report.cached_values_source
    loss = report.loss
    told = "" if loss is None else f", mean KL {loss.mean_kl:.2g}: {loss.verdict}"
    summary = (
        f"compressed {checkpoint} to {out} in {report.seconds:.1f} s: "
        f"{100 * share:.0f} % of the cache{told}"
    )
    return Outcome(summary, report.to_dict(), compress_sheets(report))
