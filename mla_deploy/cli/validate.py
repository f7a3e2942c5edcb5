"""`mla-deploy validate`: is the bundle equal to its PyTorch source, and as small as promised?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mla_deploy.cli.output import Outcome, Screen
from mla_deploy.cli.progress import progress_bar
from mla_deploy.cli.verb import verb


@click.command(short_help="Is the bundle equal to its PyTorch source? Exit 3 if not.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--source", type=click.Path(path_type=Path), help="The checkpoint.")
@click.option("--module", metavar="FILE:FACTORY", help="Your own torch.nn.Module instead.")
@click.option("--weights", metavar="FILE", help="Of --module: its .safetensors file.")
@click.option("--junit", type=click.Path(path_type=Path), help="Write the cases as JUnit XML.")
@click.option("--report", type=click.Path(path_type=Path), help="Write the report as JSON.")
@click.option("--verify", type=click.Choice(["full", "sizes"]), help="By hash, or by size.  [full]")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of ONNX Runtime.")
@verb
def validate(
    screen: Screen,
    bundle: Path,
    *,
    source: Path | None = None,
    module: str | None = None,
    junit: Path | None = None,
    report: Path | None = None,
    **options: Any,
) -> Outcome:
    """Run BUNDLE against its source over prefill, chunks, decode steps and ragged batches.

    The source is the checkpoint or the module that BUNDLE was exported from.
    """
    if (source is None) == (module is None):
        raise click.UsageError("one of --source and --module is needed.")
    import mla_deploy
    from mla_deploy.cli.report_sheets import report_refusal, report_sheets, report_summary
    from mla_deploy.validate import write_json, write_junit

    with progress_bar(screen) as progress:
        found = mla_deploy.validate(
            bundle, source=source, module=module, progress=progress, **options
        )
    if report is not None:
        write_json(found, report)
    if junit is not None:
        write_junit(found, junit)
    result = found.to_dict()
    return Outcome(
        f"{bundle}: {report_summary(result)}", result, report_sheets(result), report_refusal(result)
    )
