"""`mla-deploy inspect`: what a checkpoint, a bundle or somebody else's ONNX graph holds."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from mla_deploy.cli.output import Outcome, Screen, byte_text
from mla_deploy.cli.verb import verb

Verify = Literal["full", "sizes"]


@click.command(short_help="What a checkpoint, a bundle or an ONNX graph holds.")
@click.argument("path", metavar="CHECKPOINT_OR_BUNDLE_OR_ONNX", type=click.Path(path_type=Path))
@click.option(
    "--verify",
    type=click.Choice(["full", "sizes"]),
    help="A bundle's files by hash, or by size only (faster).  [full]",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="An ONNX graph's config.json, for its softmax scale.  [the one beside it]",
)
@verb
def inspect(
    screen: Screen, path: Path, verify: Verify | None = None, config: Path | None = None
) -> Outcome:
    """Show the model's sizes by axis letter, what its cache costs, and what is in the folder.

    A folder with a manifest.json or mla-deploy.manifest.json is a bundle, any other a checkpoint.
    Of an ONNX file: which attentions are MLA, what is cached, and known faults of its exporter.
    """
    from mla_deploy.bundle import is_bundle

    if path.is_file():
        from mla_deploy.cli.graph_sheets import survey_outcome

        return survey_outcome(path, config)
    if is_bundle(path):
        return _inspect_bundle(path, verify or "full")
    return _inspect_checkpoint(path)


def _inspect_checkpoint(path: Path) -> Outcome:
    from mla_deploy import open_checkpoint
    from mla_deploy.cli.checkpoint_sheets import checkpoint_result, checkpoint_sheets

    with open_checkpoint(path) as checkpoint:
        result = checkpoint_result(checkpoint)
        sheets = checkpoint_sheets(checkpoint)
    cache = result["cache"]
    summary = (
        f"{path}: {result['model']['model_type']}, {byte_text(result['weights']['total_bytes'])} "
        f"of weights; a cached token takes {byte_text(cache['latent_bytes_per_token'])}, "
        f"{cache['ratio']:.1f}x less than expanded heads"
    )
    return Outcome(summary, result, sheets)


def _inspect_bundle(path: Path, verify: Verify) -> Outcome:
    from mla_deploy import open_bundle
    from mla_deploy.cli.bundle_sheets import bundle_result, bundle_sheets

    bundle = open_bundle(path, verify=verify)
    result = {**bundle_result(bundle), "verified": bundle.verified}
    summary = (
        f"{path}: bundle of {result['model']['model_type']} for {result['target']}, "
        f"{result['dtype']}, {byte_text(result['total_bytes'])}; files match ({bundle.verified})"
    )
    return Outcome(summary, result, bundle_sheets(bundle))
