"""`mla-deploy report`: a validation report that was written before, shown and rendered again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mla_deploy.cli.output import Outcome, Screen
from mla_deploy.cli.report_files import report_files, taken_files, write_files
from mla_deploy.cli.verb import verb


@click.command(short_help="Show a validation report, or render it as HTML, Markdown or JUnit.")
@click.argument("report_file", metavar="REPORT", type=click.Path(path_type=Path))
@report_files("--out")
@verb
def report(screen: Screen, report_file: Path, **options: Any) -> Outcome:
    """Show REPORT, which `validate --report REPORT.json` wrote, here or on another machine.

    `validate --json` is taken too. A report of another schema version is refused. Exit 0 whatever
    the verdict is: it was reached by `validate`.
    """
    from mla_deploy.cli.report_sheets import report_sheets, report_summary
    from mla_deploy.validate import read_report

    files = taken_files(options)
    found = read_report(report_file)
    write_files(found, files)
    return Outcome(
        f"{report_file}: {report_summary(found)}",
        {"report": found, "written": [str(place) for place, _ in files]},
        report_sheets(found),
    )
