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
@click.option(
    "--speculate",
    "ahead",
    type=click.IntRange(0, 7),
    is_flag=False,
    flag_value=0,
    metavar="[N]",
    help="Check up to N tokens ahead in one pass, drafted from the text so far.  [N: 7]",
)
@click.option(
    "--hold-weights", is_flag=True, default=None,
    help="Float weights in own memory, not mapped: faster steps.",
)  # fmt: skip
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
    ahead: int | None = None,
    verify: Literal["full", "sizes"] = "full",
    **options: Any,
) -> Outcome:
    """Print a prompt and continue it greedily; the text appears as it is made."""
    from mla_deploy import open_bundle, open_runner
    from mla_deploy.cli.greedy import greedy
    from mla_deploy.cli.pace import Pace
    from mla_deploy.cli.text import end_ids, open_stream, open_tokenizer, prompt_ids

    opened = open_bundle(bundle, verify=verify)
    tokenizer = open_tokenizer(opened)
    words = sys.stdin.read() if prompt == "-" else prompt
    ids = prompt_ids(tokenizer, opened, words)
    if options.pop("engine", False):
        options["runtime"] = "tensorrt"
    runner = open_runner(opened, **options)
    stream = open_stream(tokenizer, words, is_silent=screen.as_json)
    pace = Pace(len(ids))
    tokens, gain = greedy(runner, ids, max_new_tokens, end_ids(opened), ahead)
    for token in pace.timed(tokens):
        stream.add(token)
    stream.finish()
    result = {
        "text": stream.text,
        **pace.to_dict(),
        **({} if gain is None else {"speculation": gain.to_dict()}),
        "cache_bytes": runner.cache_bytes,
        "cache_capacity_tokens": runner.capacity,
    }
    told = f"{pace}; {gain}" if gain else str(pace)
    summary = f"{told}; cache {runner.cache_bytes:,} bytes ({runner.capacity:,} tokens a row)"
    return Outcome(summary if screen.as_json else f"\n{summary}", result)
