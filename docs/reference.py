"""Writes docs/cli.md from the commands themselves: `make docs`. A test checks it is current."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from mla_deploy.cli import exits
from mla_deploy.cli.group import group

PAGE = Path(__file__).with_name("cli.md")
_WIDTH = 80
_INTRODUCTION = """\
<!-- Written by `make docs` from mla_deploy/cli. Edit the commands, not this page. -->
# The command line

Every verb takes `--json` (exactly one object on stdout, valid by
`mla_deploy/cli/output.schema.json`), `-q` and `-v`. Results go to stdout; logs, progress and
errors to stderr. An option left out takes the library's default, shown in brackets. What the codes
of refusals mean: [errors.md](errors.md).

Shell completion: `eval "$(_MLA_DEPLOY_COMPLETE=bash_source mla-deploy)"` (or `zsh_source`,
`fish_source`).
"""


def reference() -> str:
    """The whole page."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield _INTRODUCTION
    yield from _help("mla-deploy", group, None)
    parent = click.Context(group, info_name="mla-deploy")
    for name, command in group.commands.items():
        yield from _help(f"mla-deploy {name}", command, parent)
    yield "## Exit codes"
    yield ""
    yield "| code | meaning |"
    yield "| --- | --- |"
    for code, meaning in exits.TABLE.items():
        yield f"| {code} | {meaning} |"


def _help(title: str, command: click.Command, parent: click.Context | None) -> Iterator[str]:
    name = title.rpartition(" ")[2]
    context = click.Context(
        command, info_name=name, parent=parent, terminal_width=_WIDTH, max_content_width=_WIDTH,
        help_option_names=["-h", "--help"],
    )  # fmt: skip
    yield f"## {title}"
    yield ""
    yield "```text"
    yield command.get_help(context)
    yield "```"
    yield ""


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
    print(f"wrote {PAGE}")
