"""What every verb shares: `--json`, `-q`, `-v`, and the printing of its Outcome."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import click

from mla_deploy.cli.output import Outcome, Screen

_Function = TypeVar("_Function", bound=Callable[..., Any])


def verb(function: Callable[..., Outcome]) -> Callable[..., None]:
    """Options left out (None) are not passed on: the defaults live in the library."""

    @click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON object.")
    @click.option("-q", "--quiet", is_flag=True, help="Only the summary line; no progress.")
    @click.option("-v", "--verbose", count=True, help="Log to stderr; twice for more.")
    @click.pass_obj
    @wraps(function)
    def run(screen: Screen, /, as_json: bool, quiet: bool, verbose: int, **given: Any) -> None:
        screen.configure(as_json=as_json, quiet=quiet, verbose=verbose)
        chosen = {name: value for name, value in given.items() if value is not None}
        outcome = function(screen, **chosen)
        screen.show(outcome)
        if outcome.refusal is not None:
            raise outcome.refusal

    return run


def choice(flag: str, words: str, told: str) -> Callable[[_Function], _Function]:
    """An option that takes one of `words`, which bars part."""
    return click.option(flag, type=click.Choice(words.split("|")), help=told)
