"""Markdown for a comment: verdict first, short enough whatever is in it, foreign words inert."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest

from mla_deploy.validate.outputs.markdown import MOST_CHARACTERS, markdown_bytes

KINDS = ["facts", "failed", "hostile", "full", "bare"]
GITHUB_LIMIT = 65_536


def _text(facts: dict[str, Any]) -> str:
    return markdown_bytes(facts).decode()


@pytest.mark.parametrize("kind", KINDS)
def test_verdict_is_the_first_line(kind: str, request: pytest.FixtureRequest) -> None:
    facts = request.getfixturevalue(kind)
    first = _text(facts).splitlines()[0]
    assert first.startswith("### ")
    assert ("NOT equal" in first) is not facts["passed"]


@pytest.mark.parametrize("kind", KINDS)
def test_folds_and_tables_are_whole(kind: str, request: pytest.FixtureRequest) -> None:
    text = _text(request.getfixturevalue(kind))
    assert text.count("<details>") == text.count("</details>") >= 2
    columns = 0
    for line in text.splitlines():
        count = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert not columns or not count or count == columns, line
        columns = count
    assert not re.search(r"</summary>\n(?!\n)", text)


def test_failures_stand_outside_of_the_folds(failed: dict[str, Any]) -> None:
    before = _text(failed).partition("<details>")[0]
    assert "Gates not met" in before
    assert "RUN-FINITE: logits are not finite" in before
    assert "layer.1/MatMul_3" in before


def test_other_parts_are_told(full: dict[str, Any]) -> None:
    text = _text(full)
    assert "NOT equal to the goldens" in text
    for word in ("rounding", "loss", "text", "uncached", "novel.txt", "perplexity times at most"):
        assert word in text


def test_never_longer_than_a_comment_may_be(failed: dict[str, Any]) -> None:
    told = failed["cases"][0] | {"name": "n" * 5000, "failures": ["f" * 9000, "g" * 9000]}
    failed["cases"] = [{**told, "name": f"{'n' * 5000}{index}"} for index in range(3000)]
    failed |= {"notes": ["n" * 50_000] * 50, "name": "b" * 50_000, "target": "t" * 50_000}
    failed["versions"] = {f"{'v' * 900}{index}": "1" * 9000 for index in range(500)}
    failed["bisect"] = dict.fromkeys(failed["bisect"], "x" * 9000)
    text = _text(failed)
    assert len(text) <= MOST_CHARACTERS < GITHUB_LIMIT
    assert "more, in the report's JSON" in text and "more lines" in text


def test_those_that_failed_come_first_in_the_table(facts: dict[str, Any]) -> None:
    wrong = copy.deepcopy(facts["cases"][0]) | {"name": "zz", "passed": False, "failures": ["no"]}
    facts["cases"].append(wrong)
    rows = [line for line in _text(facts).splitlines() if line.startswith("| `")]
    cases = [row for row in rows if row.startswith(("| `zz`", "| `prefill-1`"))]
    assert cases[0].startswith("| `zz`")
    assert "**FAILED**" in cases[0]


def test_foreign_words_stand_in_code(hostile: dict[str, Any]) -> None:
    """Outside of code spans there is no tag but our own, no link, no mention."""
    outside = re.sub(r"`[^`\n]*`", "", _text(hostile))
    bare = re.sub(r"\\.", "", outside)  # escaped by us
    assert "`" not in bare
    assert set(re.findall(r"<[^>]*>?", bare)) <= {"<details>", "<summary>", "</summary>",
                                                  "</details>"}  # fmt: skip
    assert "@" not in bare and "](" not in bare
    assert not re.search(r"^# h", bare, re.MULTILINE)
