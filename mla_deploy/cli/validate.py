"""`mla-deploy validate`: is the bundle equal to its PyTorch source, and as small as promised?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mla_deploy.cli.output import Outcome, Screen
from mla_deploy.cli.progress import progress_bar
from mla_deploy.cli.report_files import report_files
from mla_deploy.cli.verb import verb


@click.command(short_help="Is the bundle equal to its PyTorch source? Exit 3 if not.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--source", type=click.Path(path_type=Path), help="The checkpoint.")
@click.option("--module", metavar="FILE:FACTORY", help="Your own torch.nn.Module instead.")
@click.option("--weights", metavar="FILE", help="Of --module: its .safetensors file.")
@report_files("--report")
@click.option("--verify", type=click.Choice(["full", "sizes"]), help="By hash, or by size.  [full]")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of ONNX Runtime.")
@click.option(
    "--engine", is_flag=True, default=None, help="Its engines: on their GPU, else what can be said."
)
@click.option("--trust", metavar="DIGEST", multiple=True, help="--engine: though others built it.")
@click.option(
    "--device-report",
    type=click.Path(path_type=Path),
    help="Judge a device package's report.",
)
@verb
def validate(
    screen: Screen, bundle: Path, *, engine: bool = False, device_report: Path | None = None,
    **options: Any,
) -> Outcome:  # fmt: skip
    """Run BUNDLE against its source over prefill, chunks, decode steps and ragged batches.

    The source is the checkpoint or the module that BUNDLE was exported from. --engine and
    --device-report ask about its TensorRT engines instead; a source is then optional.
    """
    from mla_deploy.cli import validate_sheets

    options = {name: value for name, value in options.items() if value != ()}
    if device_report is not None:
        return validate_sheets.judged(bundle, device_report, **options)
    with progress_bar(screen) as progress:
        if engine:
            return validate_sheets.engines_checked(bundle, progress=progress, **options)
        if ("source" in options) == ("module" in options) or "trust" in options:
            raise click.UsageError("wanted one of --source, --module, --engine, --device-report")
        return validate_sheets.validated(bundle, progress=progress, **options)
