"""Which file a report is written as: the suffix of its name decides."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from mla_deploy.errors import InputError, quoted
from mla_deploy.validate.outputs.html_page import html_bytes
from mla_deploy.validate.outputs.json_file import json_bytes
from mla_deploy.validate.outputs.junit import junit_bytes
from mla_deploy.validate.outputs.markdown import markdown_bytes
from mla_deploy.validate.outputs.replaced import Facts, Report, check_place, facts_of, replace_file

SUFFIXES: dict[str, Callable[[Facts], bytes]] = {
    ".json": json_bytes,
    ".xml": junit_bytes,
    ".md": markdown_bytes,
    ".html": html_bytes,
}


def check_destination(path: str | os.PathLike[str], suffix: str | None = None) -> None:
    """Refuse a place that `write_report` could not write, before there is a report.

    Raises: InputError REP-SUFFIX, FILE-NAME, FILE-MISSING, FILE-TYPE; EnvironmentFailure
    FILE-PERMISSION.
    """
    _writer(path, suffix)
    check_place(path)


def write_report(report: Report, path: str | os.PathLike[str], suffix: str | None = None) -> None:
    """Write the report as what `suffix` says: .json, .xml (JUnit), .md or .html; None: the path's.

    Raises: as `check_destination`, EnvironmentFailure FILE-*.
    """
    replace_file(path, _writer(path, suffix)(facts_of(report)))


def _writer(path: str | os.PathLike[str], suffix: str | None) -> Callable[[Facts], bytes]:
    found = (Path(path).suffix if suffix is None else suffix).lower()
    if found not in SUFFIXES:
        raise InputError(
            "REP-SUFFIX",
            f"{quoted(os.fspath(path))} ends in {quoted(found) if found else 'no suffix'}, "
            f"wanted one of {', '.join(SUFFIXES)}",
            hint="the suffix says what is written: JSON, JUnit XML, Markdown or HTML",
        )
    return SUFFIXES[found]
