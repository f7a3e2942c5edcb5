"""`mla-deploy rewrite`: another exporter's ONNX model -> a bundle with a latent cache."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import click

from mla_deploy.cli.output import Outcome, Screen, byte_text
from mla_deploy.cli.progress import progress_bar
from mla_deploy.cli.verb import choice, verb


@click.command(short_help="Another exporter's ONNX model to a bundle; no PyTorch source.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The bundle to write.")
@click.option("--target", help="What it will run on.  [cpu]")
@choice("--dtype", "fp32|fp16|bf16", "Storage of weights and cache.  [as in MODEL]")
@choice("--cache", "in-place|growing", "Bound buffer, or one that grows at each step.  [in-place]")
@choice("--cache-layout", "fused|split", "Latent and rope key in one tensor, or in two.  [fused]")
@choice("--cache-dtype", "fp32|fp16|bf16", "Of the cache alone.  [--dtype]")
@click.option("--capacity", type=int, help="Tokens a row reserves by default.")
@click.option("--all-logits", is_flag=True, default=None, help="Logits of every new token.")
@click.option("--replace", is_flag=True, default=None, help="Swap out a bundle that is there.")
@click.option("--explain", is_flag=True, help="One layer before and after; OUT.explain.svg too.")
@click.option("--context", type=int, help="Tokens of the step that --explain counts.  [4096]")
@verb
def rewrite(
    screen: Screen,
    model: Path,
    out: Path,
    explain: bool,
    context: int | None = None,
    **options: Any,
) -> Outcome:
    """Rewrite MODEL, an .onnx file that another exporter wrote, to the bundle OUT.

    MLA is found in what the graph computes: keys and values that every head makes from one narrow
    row a token. That row becomes the cache, whatever was cached before, and the projections are
    absorbed. Before OUT is there, both graphs have answered the same random tokens, prefill and
    decode steps; if their logits differ, or one layer is not MLA, nothing is written.
    """
    import mla_deploy
    from mla_deploy.cli.bundle_sheets import bundle_result, bundle_sheets
    from mla_deploy.cli.explanation import check_explain, with_explanation
    from mla_deploy.cli.rewrite_sheets import proof_sheet

    check_explain(explain, context)
    started = perf_counter()
    with progress_bar(screen) as report:
        bundle = mla_deploy.rewrite_model(model, out, progress=report, **options)
    seconds = perf_counter() - started
    rewritten = bundle.manifest["rewritten"]
    proof = rewritten["proof"]
    result = {
        **bundle_result(bundle),
        "rewritten": rewritten,
        "rewrite_seconds": round(seconds, 3),
    }
    summary = (
        f"rewrote {model} to {out} in {seconds:.1f} s: {result['model']['num_layers']} layers, "
        f"{byte_text(result['cache']['bytes_per_token'])} of cache a token, logits within "
        f"{proof['max_abs']:.1e} over {proof['calls']} calls"
    )
    sheets = (proof_sheet(rewritten), *bundle_sheets(bundle))
    outcome = Outcome(summary, result, sheets)
    return with_explanation(outcome, model, bundle, context) if explain else outcome
