"""`mla-deploy run`: generate text from a bundle."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import click

from mla_deploy.cli.output import Outcome, Screen
from mla_deploy.cli.verb import verb


@click.command(short_help="Generate text; tokens a second, cache bytes.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="The text to continue; `-` reads stdin.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Stop after so many.  [128]")
@click.option("--capacity", type=int, help="Tokens to reserve in the cache.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of ONNX Runtime.")
@click.option("--verify", type=click.Choice(["full", "sizes"]), help="By hash, or by size.  [full]")
@click.option(
    "--engine", is_flag=True, default=None, help="Its TensorRT engines, on this machine's GPU."
)
@click.option("--trust", metavar="DIGEST", multiple=True, help="Engines that others built.")
@verb
def run(
    screen: Screen,
    bundle: Path,
    *,
    prompt: str,
    max_new_tokens: int = 128,
    verify: Literal["full", "sizes"] = "full",
    **options: Any,
) -> Outcome:
    """Print a prompt and continue it greedily; the text appears as it is made."""
    from mla_deploy import generate, open_bundle, open_runner
    from mla_deploy.cli.pace import Pace
    from mla_deploy.cli.text import TextStream, end_ids, open_tokenizer, prompt_ids

    opened = open_bundle(bundle, verify=verify)
    tokenizer = open_tokenizer(opened)
    words = sys.stdin.read() if prompt == "-" else prompt
    ids = prompt_ids(tokenizer, opened, words)
    if options.pop("engine", False):
        options["runtime"] = "tensorrt"
    runner = open_runner(opened, **options)
    stream = TextStream(tokenizer, _nothing if screen.as_json else _write_now)
    if not screen.as_json:
        _write_now(words)
    pace = Pace(len(ids))
    for token in pace.timed(generate(runner, ids, max_new_tokens, end_ids(opened))):
        stream.add(token)
    stream.finish()
    result = {
        "text": stream.text,
        **pace.to_dict(),
        "cache_bytes": runner.cache_bytes,
        "cache_capacity_tokens": runner.capacity,
    }
    summary = f"{pace}; cache {runner.cache_bytes:,} bytes ({runner.capacity:,} tokens a row)"
    return Outcome(summary if screen.as_json else f"\n{summary}", result)


def _write_now(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _nothing(_text: str) -> None:
    """With `--json` the text is in the object."""
