"""`mla-deploy bench`: how fast is a bundle, beside other ways to run its model?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mla_deploy.cli.output import Outcome, Screen
from mla_deploy.cli.progress import progress_bar
from mla_deploy.cli.verb import verb


def _counts(_context: click.Context, _option: click.Parameter, text: str | None) -> Any:
    from mla_deploy.bench.sizes import token_counts

    try:
        return None if text is None else token_counts(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command(short_help="Seconds a step, beside those of other runtimes.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--against",
    multiple=True,
    metavar="NAME|BUNDLE",
    help="transformers, onnx-exporter, openvino, llama.cpp[:TYPE], or another bundle; repeat it.",
)
@click.option("--source", type=click.Path(path_type=Path), help="The checkpoint that peers run.")
@click.option(
    "--context", metavar="COUNTS", callback=_counts, help="Tokens cached.  [512,2k,8k,32k]"
)
@click.option("--prefill", metavar="COUNTS", callback=_counts, help="Also read so many tokens.")
@click.option("--threads", type=click.IntRange(min=1), help="Of every contender.  [all cores]")
@click.option("--hold-weights", is_flag=True, default=None, help="Of bundles; as `run` takes it.")
@click.option("--rounds", type=click.IntRange(min=1), help="Turns that each takes.  [5]")
@click.option("--work", type=click.Path(path_type=Path), help="Folder for what peers need written.")
@verb
def bench(
    screen: Screen, bundle: Path, *, against: tuple[str, ...] = (), **options: Any
) -> Outcome:
    """Time decode steps of BUNDLE, and of each contender, in one run and in turn.

    Each contender is a process of its own with the same threads. Logits of a short prompt are
    compared first. Only ratios of one run mean something: a machine is never idle. Beside them
    stands the bound: the bytes that a step must read over the bandwidth that was measured.
    """
    from mla_deploy.bench.compare import compare
    from mla_deploy.cli.bench_sheets import bench_sheets, bench_summary

    with progress_bar(screen) as progress:
        found = compare(bundle, against=against, progress=progress, **options)
    return Outcome(bench_summary(found), found.to_dict(), bench_sheets(found))
