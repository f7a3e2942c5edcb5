"""`mla-deploy doctor`: what this machine can do, and what each absence means."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mla_deploy.cli.output import Outcome, Screen, Sheet
from mla_deploy.cli.progress import progress_bar
from mla_deploy.cli.verb import verb

if TYPE_CHECKING:
    from mla_deploy.machine import Finding

_MARK = {"ok": "ok", "absent": "-", "broken": "BROKEN"}


@click.command(short_help="What this machine can do: libraries, providers, GPU, memory.")
@verb
def doctor(screen: Screen) -> Outcome:
    """List what is found here, and what each absence means. Always succeeds."""
    from mla_deploy.machine import examine_machine

    with progress_bar(screen) as report:
        findings = examine_machine(report)
    rows = [(_MARK[finding.state], finding.what, _told(finding)) for finding in findings]
    broken = [finding.what for finding in findings if finding.state == "broken"]
    absent = [finding.what for finding in findings if finding.state == "absent"]
    parts = [f"{sum(1 for finding in findings if finding.state == 'ok')} ok"]
    parts += [f"absent: {', '.join(absent)}"] if absent else []
    parts += [f"broken: {', '.join(broken)}"] if broken else []
    return Outcome(
        f"this machine: {'; '.join(parts)}",
        {"findings": [finding.to_dict() for finding in findings]},
        (Sheet("", ("", "what", "found, and what it means"), rows),),
    )


def _told(finding: Finding) -> str:
    return f"{finding.found}: {finding.meaning}" if finding.meaning else finding.found
