"""What every bench prints: a table, one JSON object, and goals reached or missed."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Goal:
    """A figure that the project promised: `found` against `wanted`, at least or at most.

    `found` None says that this run did not measure it.
    """

    what: str
    found: float | None
    wanted: float
    unit: str = "x"
    at_least: bool = True

    @property
    def verdict(self) -> str:
        if self.found is None:
            return "not measured"
        enough = self.found >= self.wanted if self.at_least else self.found <= self.wanted
        return "reached" if enough else "missed"


@dataclass
class Report:
    """Rows of one bench, with the provenance of its figures."""

    bench: str
    provenance: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        goals = [{**asdict(goal), "verdict": goal.verdict} for goal in self.goals]
        return {"bench": self.bench, **self.provenance, "rows": self.rows, "goals": goals}


def bench_arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every bench has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--realtime", action="store_true", help="SCHED_RR around what is timed")
    parser.add_argument(
        "--work", type=Path, help="folder for checkpoints (default: a temporary one)"
    )
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="JSON to FILE, or to stdout"
    )
    return parser


def show(report: Report, json_to: str | None) -> None:
    """Print the tables (to stderr when the JSON goes to stdout) and write the JSON."""
    console = Console(stderr=json_to == "-", width=118 if not sys.stdout.isatty() else None)
    for name, facts in report.provenance.items():
        console.print(f"[dim]{name}: {', '.join(f'{k} {v}' for k, v in facts.items())}[/]")
    for title in dict.fromkeys(str(row["table"]) for row in report.rows):
        console.print(_table(title, [r for r in report.rows if r["table"] == title]))
    for goal in report.goals:
        sign = "at least" if goal.at_least else "at most"
        found = "-" if goal.found is None else f"{goal.found:.4g} {goal.unit}"
        style = {"reached": "green", "missed": "red"}.get(goal.verdict, "yellow")
        console.print(
            f"[{style}]{goal.verdict:>12}[/]  {goal.what}: {found}, "
            f"wanted {sign} {goal.wanted:g} {goal.unit}"
        )
    text = json.dumps(report.to_dict(), indent=1)
    if json_to == "-":
        print(text)
    elif json_to:
        Path(json_to).write_text(text + "\n", encoding="utf-8")


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "table"))
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(_cell(row.get(column, "")) for column in columns))
    return table


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
