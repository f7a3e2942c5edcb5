"""The options that name a report's files, alike for `validate` and `report`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

_Function = TypeVar("_Function", bound=Callable[..., Any])
# (place, suffix of the form or None for its own) of every file asked for
Files = tuple[tuple[Path, str | None], ...]
_FORMS = {".xml": "junit", ".html": "html", ".md": "markdown"}
_TOLD = {
    "junit": "Write the cases as JUnit XML.",
    "html": "Write the report as one HTML page.",
    "markdown": "Write the report as Markdown, for a comment.",
}


def report_files(flag: str) -> Callable[[_Function], _Function]:
    """`flag`, which may be given several times and goes by suffix, and one option per form."""

    def add(function: _Function) -> _Function:
        place = click.Path(path_type=Path)
        for name, told in reversed(_TOLD.items()):
            function = click.option(f"--{name}", type=place, metavar="FILE", help=told)(function)
        told = "Write the report: .json, .xml, .md or .html by its suffix; repeat it."
        return click.option(
            flag, "report", multiple=True, type=place, metavar="FILE", help=told
        )(function)  # fmt: skip

    return add


def taken_files(options: dict[str, Any]) -> Files:
    """The files asked for, taken out of `options`.

    Raises: as `check_destination`: nothing is worked on for a file that cannot be written.
    """
    from mla_deploy.validate import check_destination

    asked: list[tuple[Path, str | None]] = [(place, None) for place in options.pop("report", ())]
    for form, name in _FORMS.items():
        if name in options:
            asked.append((options.pop(name), form))
    for place, suffix in asked:
        check_destination(place, suffix)
    return tuple(asked)


def write_files(report: Any, files: Files) -> None:
    """Write each of `taken_files`. Raises: as `write_report`."""
    from mla_deploy.validate import write_report

    for place, suffix in files:
        write_report(report, place, suffix)
