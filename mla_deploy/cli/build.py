"""`mla-deploy build`: bundle -> TensorRT engines in its folder `engine/`."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import click

from mla_deploy.cli.output import Outcome, Screen
from mla_deploy.cli.progress import progress_bar
from mla_deploy.cli.verb import verb


@click.command(short_help="Bundle to TensorRT engines, audited.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    metavar="GRAPH:AXIS=MIN..MAX@OPT,...",
    help="As in prefill:batch=1..4,new_tokens=1..1024@512. Several for a graph cost the weights "
    "once more each.  [the bundle's]",
)
@click.option(
    "--sm", "sms", multiple=True, metavar="X.Y", help="TensorRT-RTX only.  [the target's]"
)
@click.option(
    "--plugin",
    type=click.Choice(["auto", "on", "off"]),
    help="MlaDecode in place of plain operators.  [auto: where --plugin-library is given]",
)
@click.option("--plugin-library", type=click.Path(path_type=Path), help="The plugin's .so file.")
@click.option(
    "--weight-streaming", is_flag=True, default=None, help="Weights may stay on the host."
)
@click.option(
    "--audit",
    "audit_mode",
    type=click.Choice(["off", "warn", "fail"]),
    help="What a limit that is passed over does.  [fail: nothing is written, exit 3]",
)
@click.option("--timeout", type=click.FloatRange(min=1), help="Seconds for each engine.  [14400]")
@click.option("--replace", is_flag=True, default=None, help="Swap out engines that are there.")
@click.option("--dry-run", is_flag=True, help="What would be built, and its memory; no TensorRT.")
@click.option("--package", type=click.Path(path_type=Path), help="Write a folder that"
              " is built and verified on the device, with no torch.")  # fmt: skip
@click.option("--source", type=click.Path(path_type=Path), help="The checkpoint that"
              " --package takes golden outputs from.  [ONNX Runtime]")  # fmt: skip
@verb
def build(screen: Screen, bundle: Path, *, dry_run: bool, **options: Any) -> Outcome:
    """Build BUNDLE's prefill and decode engines, into its folder engine/.

    Bundles for rtx-* and dgx-spark build on any x86-64 machine, with no GPU; others need the
    TensorRT of their device. Graphs and profiles are linted, memory and disk checked, and what was
    built is held against limits.
    """
    from mla_deploy.cli.build_sheets import built_outcome, planned_outcome

    if "package" in options or "source" in options:
        from mla_deploy.cli.package_sheets import packaged

        return packaged(bundle, dry_run=dry_run, **options)
    if dry_run:
        from mla_deploy.engine.pipeline import plan_build

        return planned_outcome(plan_build(bundle, profiles=options["profiles"], sms=options["sms"]))
    import mla_deploy

    started = perf_counter()
    with progress_bar(screen) as report:
        made = mla_deploy.build(bundle, progress=report, **options)
    return built_outcome(made, perf_counter() - started)
