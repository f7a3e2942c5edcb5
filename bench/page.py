"""Puts the results in `bench/results/` into docs/benchmarks.md, between its two markers.

    python bench/page.py

The page is the only place where figures stand in prose form, and no one types them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]
_PAGE = _ROOT / "docs" / "benchmarks.md"
_MARKERS = "<!-- results: python bench/page.py -->", "<!-- end of results -->"


def main() -> None:
    text = _PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(_MARKERS[0])
    after = rest.partition(_MARKERS[1])[2]
    results = sorted((_ROOT / "bench" / "results").glob("*.json"))
    sections = [_section(json.loads(path.read_text(encoding="utf-8"))) for path in results]
    body = "\n\n".join((_MARKERS[0], *sections, _MARKERS[1]))
    _PAGE.write_text(before + body + after, encoding="utf-8")


def _section(result: dict[str, Any]) -> str:
    facts = [
        f"{name}: " + ", ".join(f"{k} {_cell(v)}" for k, v in result[name].items())
        for name in ("machine", "versions", "settings")
    ]
    parts = [f"### {result['bench']}", "\n".join(f"- {fact}" for fact in facts)]
    for title in dict.fromkeys(row["table"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["table"] == title]
        parts.append(f"**{title}**\n\n{_markdown(rows)}")
    goals = [
        {"goal": g["what"], "found": g["found"], "wanted": _wanted(g), "verdict": g["verdict"]}
        for g in result["goals"]
    ]
    return "\n\n".join([*parts, _markdown(goals)])


def _wanted(goal: dict[str, Any]) -> str:
    sign = "at least" if goal["at_least"] else "at most"
    return f"{sign} {_cell(goal['wanted'])} {goal['unit']}"


def _markdown(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "table"))
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
