"""The report as Markdown for a comment on a pull request: verdict first, the rest folded.

Foreign words (names, messages) stand in code spans, where Markdown, HTML and @names mean nothing.
A comment may have 65,536 characters; cases that do not fit are counted, those that failed last.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from mla_deploy.shapes import byte_text
from mla_deploy.validate.outputs.findings import (
    case_groups,
    checks_of,
    group_name,
    number,
    over_all,
    verdict_of,
    worst,
)
from mla_deploy.validate.outputs.replaced import Facts, Report, facts_of, replace_file

MOST_CHARACTERS = 65_000
_TABLE_CHARACTERS, _LIST_CHARACTERS, _LONGEST_SPAN = 30_000, 12_000, 300
Table = Sequence[Sequence[object]]
_BAR = r"\|"  # a bar inside a cell


def write_markdown(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the report as Markdown. Replaces and raises as `replace_file`."""
    replace_file(path, markdown_bytes(facts_of(report)))


def markdown_bytes(facts: Facts) -> bytes:
    """At most `MOST_CHARACTERS`, whatever the report holds."""
    return ("\n".join(_lines(facts)) + "\n").encode("utf-8", "replace")


def _lines(facts: Facts) -> Iterator[str]:
    verdict = verdict_of(facts)
    mark = "\N{WHITE HEAVY CHECK MARK}" if verdict.passed else "\N{CROSS MARK}"
    name = f" {_span(facts['name'])}" if facts.get("name") else ""
    yield f"### {mark} mla-deploy validate{name}: {verdict.headline}"
    yield ""
    yield _plain(verdict.told)
    yield from _failures(facts)
    yield from _judgements(facts)
    yield from _folded(f"{len(facts['cases'])} cases", _case_lines(facts))
    if facts.get("memory"):
        yield from _folded("Memory and cache", _memory_lines(facts))
    if facts.get("speed"):
        yield from _folded("Decode steps", _speed_lines(facts["speed"]))
    yield from _folded("Notes, versions, digests", _provenance_lines(facts))


def _failures(facts: Facts) -> Iterator[str]:
    """Outside of the folds: who opens the comment needs these."""
    told = [
        f"- {_span(case['name'])}: {_span(failure)}"
        for case in facts["cases"]
        for failure in case["failures"]
    ]
    told += [f"- {_span(c.name)}: {_span(f)}" for c in checks_of(facts) for f in c.failures]
    if told:
        yield ""
        yield "**Gates not met**"
        yield ""
        yield from _bounded(told, _LIST_CHARACTERS, "- and {left} more, in the report's JSON")
    bisect = facts.get("bisect")
    if bisect:
        where = ", ".join(
            f"{key.replace('_', ' ')} {_span(bisect[key])}"
            for key in ("graph", "layer", "node", "op_type", "output")
            if bisect.get(key) is not None
        )
        reason = f": {_span(bisect['reason'])}" if bisect.get("reason") else ""
        yield ""
        yield f"**First place beyond the gate**: {where}{reason}"


def _judgements(facts: Facts) -> Iterator[str]:
    rows = [
        (check.name, _span(check.found), _span(check.wanted), _mark(check.passed))
        for check in checks_of(facts)
    ]
    yield ""
    yield from _table(("over all cases", "found", "wanted", ""), rows)
    told = over_all(facts)
    if told:
        yield ""
        yield told


def _case_lines(facts: Facts) -> Iterator[str]:
    gates = facts["gates"]
    bounds = [case["max_abs_bound"] for case in facts["cases"] if case.get("max_abs_bound")]
    last = ("*at most*", "", "", number(max(bounds, default=None)), number(gates["rel_l2"]),
            number(gates["mean_kl"]), number(gates["cache_rel_l2"]), "")  # fmt: skip
    groups = case_groups(facts["cases"])
    # Those that failed first: they stay when there is no room for all.
    ordered = sorted(groups, key=lambda cases: bool(cases[0]["passed"]))
    header, rule, *rows = _table(
        ("case", "rows", "tokens", "max diff", "rel L2", "mean KL", "cached rows", ""),
        [*(_case_row(cases) for cases in ordered), last], right=range(1, 7),
    )  # fmt: skip
    yield header
    yield rule
    yield from _bounded(rows[:-1], _TABLE_CHARACTERS, "| and {left} more lines | | | | | | | |")
    yield rows[-1]


def _case_row(cases: Sequence[dict[str, Any]]) -> tuple[object, ...]:
    return (
        _span(group_name(cases)),
        cases[0]["batch"],
        cases[0]["tokens"],
        number(worst(cases, "logits", "max_abs")),
        number(worst(cases, "logits", "rel_l2")),
        number(worst(cases, "logits", "mean_kl")),
        number(worst(cases, "cache", "worst_rel_l2")),
        _mark(cases[0]["passed"]),
    )


def _memory_lines(facts: Facts) -> Iterator[str]:
    memory = facts["memory"]
    tokens = memory["capacity_tokens"]
    yield from _table(
        ("bytes", "predicted", "measured"),
        [
            ("cache, a token", f"{memory['predicted_bytes_per_token']:,}",
             f"{memory['manifest_bytes_per_token']:,}"),
            (f"cache, {tokens:,} tokens", f"{memory['predicted_cache_bytes']:,}",
             f"{memory['cache_bytes']:,}"),
            ("the same as full heads", f"{memory['expanded_cache_bytes']:,}", "-"),
            ("weight file", "-", byte_text(memory["weight_file_bytes"])),
            ("sessions, besides the weights", "-", byte_text(memory["session_private_bytes"])),
        ],
        right=(1, 2),
    )  # fmt: skip
    cache = facts.get("cache")
    if cache:
        yield ""
        yield from _table(
            ("cache", "dtype", "bytes a token"),
            [(form["form"] + (" (this bundle)" if form["is_bundle"] else ""), _span(form["dtype"]),
              f"{form['bytes_per_token']:,}") for form in cache["forms"]],
            right=(2,),
        )  # fmt: skip


def _speed_lines(speed: dict[str, Any]) -> Iterator[str]:
    yield from _table(
        ("tokens cached", "ms a step, median", "least", "most"),
        [(f"{point['context']:,}", *(f"{point[name]:.2f}" for name in
                                     ("median_ms", "min_ms", "max_ms")))
         for point in speed["points"]],
        right=range(4),
    )  # fmt: skip
    threads = speed["threads"] or f"default, {speed['cores']} cores"
    yield ""
    yield f"{_span(speed['runtime'])} on {_span(speed['processor'])}, threads: {threads}"


def _provenance_lines(facts: Facts) -> Iterator[str]:
    for note in facts["notes"][:20]:
        yield f"- {_span(note)}"
    for name in ("bundle_digest", "source_digest", "made_at"):
        if facts.get(name):
            yield f"- {name.replace('_', ' ')}: {_span(facts[name])}"
    versions = list(facts["versions"].items())[:20]
    yield "- " + ", ".join(f"{_span(name)} {_span(version)}" for name, version in versions)
    yield f"- {facts['seconds']:.1f} s"


def _folded(title: str, lines: Iterator[str]) -> Iterator[str]:
    yield ""
    yield f"<details><summary>{title}</summary>"
    yield ""  # GitHub and GitLab read Markdown inside only after an empty line
    yield from lines
    yield ""
    yield "</details>"


def _table(columns: Sequence[str], rows: Table, right: Sequence[int] = ()) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    rules = ("--:" if index in right else "---" for index in range(len(columns)))
    yield f"| {' | '.join(rules)} |"
    for row in rows:
        yield f"| {' | '.join(str(cell).replace('|', _BAR) for cell in row)} |"


def _bounded(lines: Sequence[str], most: int, told: str) -> Iterator[str]:
    room = most
    for index, line in enumerate(lines):
        room -= len(line) + 1
        if room < 0:
            yield told.format(left=len(lines) - index)
            return
        yield line


def _span(value: object) -> str:
    """Foreign words as one code span."""
    text = re.sub(r"[^\S ]|[\x00-\x1f\x7f-\x9f]", " ", str(value)).replace("`", "'")
    text = text if len(text) <= _LONGEST_SPAN else text[: _LONGEST_SPAN - 3] + "..."
    return f"`{text.strip() or '-'}`"


def _plain(text: str) -> str:
    """Our own sentence with foreign words in it."""
    return re.sub(r"([\\`*_\[\]<>#@|~])", r"\\\1", re.sub(r"\s+", " ", text))[:1000]


def _mark(passed: bool) -> str:
    return "ok" if passed else "**FAILED**"
