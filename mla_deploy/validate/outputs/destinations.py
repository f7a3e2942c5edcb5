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


def check_destination(path: str | os.PathLike[str]) -> None:
    """Refuse a place that `write_report` could not write, before there is a report.

    Raises: InputError REP-SUFFIX, FILE-MISSING, FILE-TYPE; EnvironmentFailure FILE-PERMISSION.
    """
    _writer(path)
    check_place(path)


def write_report(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the report as what the suffix of `path` says: .json, .xml (JUnit), .md or .html.

    Raises: as `check_destination`, EnvironmentFailure FILE-*.
    """
    replace_file(path, _writer(path)(facts_of(report)))


def _writer(path: str | os.PathLike[str]) -> Callable[[Facts], bytes]:
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(
            "REP-SUFFIX",
            f"{quoted(os.fspath(path))} ends in {quoted(suffix) if suffix else 'no suffix'}, "
            f"wanted one of {', '.join(SUFFIXES)}",
            hint="the suffix says what is written: JSON, JUnit XML, Markdown or HTML",
        )
    return SUFFIXES[suffix]
