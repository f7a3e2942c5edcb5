"""`mla-deploy plan`: memory, longest context and bounds of speed on a device, from the config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mla_deploy.cli.output import Outcome, Screen
from mla_deploy.cli.progress import progress_bar
from mla_deploy.cli.verb import verb


@click.command(short_help="Before the build: does it fit, how long, how fast at most.")
@click.argument("model", metavar="CHECKPOINT_OR_CONFIG", required=False)
@click.option("--device", metavar="NAMES", help="One, several with commas, cpu, or all.  [all]")
@click.option("--context", type=int, help="Tokens in each row.  [4096]")
@click.option("--batch", type=int, help="Rows.  [1]")
@click.option("--weights", metavar="FORM", help="int4, int8, fp8, as `export` takes it.  [float]")
@click.option("--cache", metavar="DTYPE", help="int8, int4, fp8, ... of the cache.  [--dtype]")
@click.option("--dtype", help="Of weights in float: fp32, fp16, bf16.  [the target's]")
@click.option("--reserve", "reserve_gib", type=float, metavar="GIB",
              help="Memory that the system and others hold.  [the device's]")  # fmt: skip
@click.option("--chart", metavar="FILE.svg", type=click.Path(path_type=Path), help="Draw it.")
@click.option("--list", "as_list", is_flag=True, default=None, help="Show models and devices.")
@verb
def plan(
    screen: Screen,
    model: str | None = None,
    chart: Path | None = None,
    as_list: bool = False,
    **asked: Any,
) -> Outcome:
    """Say what CHECKPOINT_OR_CONFIG needs on a device, what fits, and how fast it can be at most.

    A checkpoint folder, a config.json, or a published model's name such as deepseek-v2-lite. No
    weight is read and nothing is run: bytes are those of what `export` writes and runners reserve,
    speeds are bounds that bandwidth and arithmetic set.
    """
    from mla_deploy.cli.plan_sheets import listing, plan_sheets, summary

    if as_list:
        return listing()
    if model is None:
        raise click.UsageError("Missing argument 'CHECKPOINT_OR_CONFIG' (or --list).")
    import mla_deploy

    with progress_bar(screen) as progress:
        report = mla_deploy.plan(model, progress=progress, **asked)
    if chart is not None:
        from mla_deploy.plan.chart import write_chart

        write_chart(report, chart)
    result = {**report.to_dict(), "chart": None if chart is None else str(chart)}
    return Outcome(summary(report), result, plan_sheets(report))
