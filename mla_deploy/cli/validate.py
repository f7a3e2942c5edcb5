"""`mla-deploy validate`: is the bundle equal to its PyTorch source, and as small as promised?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mla_deploy.cli.output import Outcome, Screen
from mla_deploy.cli.progress import progress_bar
from mla_deploy.cli.report_files import report_files
from mla_deploy.cli.verb import verb

_PATH = click.Path(path_type=Path)


@click.command(short_help="Is the bundle equal to its PyTorch source? Exit 3 if not.")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--source", type=_PATH, help="The checkpoint, or ONNX file.")
@click.option("--module", metavar="FILE:FACTORY", help="Your own torch.nn.Module instead.")
@click.option("--weights", metavar="FILE", help="Of --module: its .safetensors file.")
@click.option("--goldens", type=_PATH, help="Saved outputs of the source instead: no torch.")
@click.option("--against", type=_PATH, help="Another bundle of the same model instead.")
@click.option("--gate", metavar="DTYPE", help="Of --against: whose gates.  [the looser of the two]")
@click.option("--bisect", is_flag=True, default=None, help="Of a failing case: the first bad node.")
@click.option("--text", type=_PATH, help="Perplexity on this text, too.")
@click.option("--save-goldens", type=_PATH, help="Save what the source says, for --goldens.")
@click.option("--save-results", type=_PATH, help="Save what BUNDLE says, for --results.")
@click.option("--results", type=_PATH, help="Judge saved results by --goldens; runs nothing.")
@report_files("--report")
@click.option("--verify", type=click.Choice(["full", "sizes"]), help="By hash, or by size.  [full]")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of ONNX Runtime.")
@click.option(
    "--engine", is_flag=True, default=None, help="Its engines: on their GPU, else what can be said."
)
@click.option("--trust", metavar="DIGEST", multiple=True, help="--engine: though others built it.")
@click.option("--device-report", type=_PATH, help="Judge a device package's report.")
@verb
def validate(
    screen: Screen, bundle: Path | None = None, *, engine: bool = False,
    device_report: Path | None = None, **options: Any,
) -> Outcome:  # fmt: skip
    """Run BUNDLE against its source over prefill, chunks, decode steps and ragged batches.

    The source is what BUNDLE was exported or rewritten from; stored goldens or another bundle can
    stand in for it. Run first, compare later: --save-results alone only runs,
    and --results with --goldens only judges. --engine and --device-report ask about its TensorRT
    engines instead; a source is then optional.
    """
    from mla_deploy.cli import validate_sheets

    options = {name: value for name, value in options.items() if value != ()}
    if "results" in options:
        return validate_sheets.results_judged(bundle, **options)
    if bundle is None:
        raise click.UsageError("wanted a BUNDLE; only --results does without")
    if device_report is not None:
        return validate_sheets.judged(bundle, device_report, **options)
    with progress_bar(screen) as progress:
        if engine:
            return validate_sheets.engines_checked(bundle, progress=progress, **options)
        ways = [way for way in ("source", "module", "goldens", "against") if way in options]
        if not ways and "save_results" in options:
            return validate_sheets.recorded(bundle, progress=progress, **options)
        if len(ways) != 1 or "trust" in options:
            raise click.UsageError(
                "wanted one of --source, --module, --goldens, --against, --results, --engine, "
                "--device-report"
            )
        return validate_sheets.validated(bundle, progress=progress, **options)
