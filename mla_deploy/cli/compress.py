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
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--budget", help="Share of the source's cached bytes, as 50%: chooses the form.")
@click.option("--rank", type=int, help="Width of the latent.  [all: exact]")
@click.option("--rope-dim", type=int, help="Values of keys that keep turning.  [all: exact]")
@choice("--method", "low-rank|transmla", "How ranks are cut.  [low-rank]")
@choice("--layout", "own|deepseek", "deepseek: what stock DeepSeek classes load.  [own]")
@choice("--beside", "own|deepseek", "Judge this layout too, on the same text.")
@click.option("--calibrate", type=click.Path(path_type=Path), help="Text to learn from.  [sample]")
@click.option("--context", type=int, help="Longest context it is for.  [the model's]")
@choice("--dtype", "fp32|fp16|bf16", "Of the weights written.  [fp32]")
@click.option("--report", type=click.Path(path_type=Path), help="Write the two views as HTML.")
@click.option("--explain", is_flag=True, default=None, help="Look at CHECKPOINT, write no model.")
@click.option("--tokens", type=int, help="Of --explain: how many judge.  [20480]")
@verb
def compress(
    screen: Screen,
    checkpoint: Path,
    out: Path | None = None,
    report: Path | None = None,
    *,
    explain: bool = False,
    **options: Any,
) -> Outcome:
    """Write CHECKPOINT, a Llama-like model, to OUT with multi-head latent attention.

    CHECKPOINT is a folder of safetensors or a GGUF file. Without --rank and --rope-dim nothing is
    lost and the cache stays as large. With them the text's first part is learnt from, its last part
    judges the loss. --budget runs forms that fit, quantised caches and cut ranks, and writes the
    one that loses least. OUT is a checkpoint that `export` takes.

    --explain shows an earlier OUT again, with --report. Of a CHECKPOINT that has latent attention
    already it shows what the latents keep, how heads lie to each other, and what cutting or
    quantising the latent loses on the text.
    """
    from mla_deploy.cli.compress_sheets import compress_sheets, words_of
    from mla_deploy.cli.explanations import explained
    from mla_deploy.compress import compress as made
    from mla_deploy.compress.told import write_page

    if explain == (out is not None) or ("tokens" in options and not explain):
        raise click.UsageError("give --out, or --explain; --tokens is of --explain")
    if explain:
        return explained(screen, checkpoint, report, options)
    with progress_bar(screen) as progress:
        told = made(checkpoint, str(out), progress=progress, **options).to_dict()
    if report is not None:
        write_page(told, report)
    words = f"compressed {checkpoint} to {out}: {words_of(told)}"
    return Outcome(words, dict(told), compress_sheets(told))
