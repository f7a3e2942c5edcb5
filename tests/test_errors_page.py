"""docs/errors.md and the source hold the same codes, and agree on their exit statuses."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from mla_deploy import errors
from mla_deploy.cli import exits

ROOT = Path(__file__).parents[1]
CODE = re.compile(r"[A-Z]{2,8}(-[A-Z0-9]+)+")
ROW = re.compile(r"^\| `([A-Z0-9-]+)` \| ([0-9, ]+) \| (.+) \|$", re.MULTILINE)
NOT_CODES = {"UTF-8"}
STATUS = {
    name: kind.exit_status
    for module in (errors, exits)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and issubclass(kind, errors.MlaDeployError)
}


def _raised() -> dict[str, set[int]]:
    """Every code in the source, with the statuses of the classes it is given to directly (none
    where a function of ours stands between)."""
    found: dict[str, set[int]] = {}
    for path in sorted((ROOT / "mla_deploy").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"), str(path))):
            if _is_code(node):
                found.setdefault(node.value, set())  # type: ignore[attr-defined]
            elif isinstance(node, ast.Call) and node.args and _is_code(node.args[0]):
                name = ast.unparse(node.func).rpartition(".")[2]
                statuses = found.setdefault(node.args[0].value, set())  # type: ignore[attr-defined]
                statuses |= {STATUS[name]} if name in STATUS else set()
    return found


def _is_code(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and CODE.fullmatch(node.value) is not None
        and node.value not in NOT_CODES
    )


def _documented() -> dict[str, tuple[set[int], str]]:
    text = (ROOT / "docs" / "errors.md").read_text("utf-8")
    rows = ROW.findall(text)
    assert len({code for code, _, _ in rows}) == len(rows), "a code is documented twice"
    return {code: ({int(part) for part in exit_.split(",")}, told) for code, exit_, told in rows}


def test_every_code_is_documented_and_every_documented_code_is_used() -> None:
    assert sorted(_raised()) == sorted(_documented())


def test_exit_statuses_are_the_ones_raised() -> None:
    documented = _documented()
    wrong = {
        code: (sorted(statuses), sorted(documented[code][0]))
        for code, statuses in _raised().items()
        if code in documented and not statuses <= documented[code][0]
    }
    assert wrong == {}


def test_every_status_is_in_the_table() -> None:
    assert {status for statuses, _ in _documented().values() for status in statuses} <= {
        *exits.TABLE
    }
    assert set(STATUS.values()) <= {*exits.TABLE}


def test_a_refusal_that_brings_no_hint_has_one_by_its_code() -> None:
    """GateError and what is our own bug tell their finding; all others say what to do."""
    bare = {
        str(node.args[0].value)  # type: ignore[attr-defined]
        for path in sorted((ROOT / "mla_deploy").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8"), str(path)))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in STATUS
        and node.args
        and _is_code(node.args[0])
        and not any(keyword.arg == "hint" for keyword in node.keywords)
        and STATUS[ast.unparse(node.func)] not in (1, 3, 130, 143)
    }
    assert {"CFG-HEADS", "FILE-MISSING"} <= bare
    assert [code for code in sorted(bare) if not errors.InputError(code, "").hint] == []
    assert errors.InputError("CFG-HEADS", "", hint="so").hint == "so"
