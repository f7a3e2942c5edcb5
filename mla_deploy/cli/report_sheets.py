"""A validation report as a summary, tables, and the refusal it stands for when a gate failed."""

from __future__ import annotations

from typing import Any

from mla_deploy.cli.loss_sheets import loss_sheets, loss_words
from mla_deploy.cli.measure_sheets import measure_sheets
from mla_deploy.cli.output import Sheet, byte_text
from mla_deploy.errors import GateError, MlaDeployError
from mla_deploy.validate.outputs.findings import case_groups, group_name, worst

_COLUMNS = ("case", "#rows", "#tokens", "#max diff", "#KL", "#flips", "#cache", "")


def report_summary(report: dict[str, Any]) -> str:
    cases = report["cases"]
    largest = worst(cases, "logits", "max_abs")
    passed = sum(1 for case in cases if case["passed"])
    top1 = report["top1"]
    other = {"goldens": "the goldens of its source", "bundle": "the other bundle"}
    same = f"equal to {other.get(_kind(report), 'its source')}"
    verdict = same if report["passed"] else f"NOT {same}"
    return (
        f"{verdict} ({report['dtype']}): {passed} of {len(cases)} cases passed, "
        f"max |logit difference| {_number(largest)}, top-1 {top1['share']:.2%} "
        f"of {top1['positions']:,} positions{loss_words(report['loss'])}"
    )


def _kind(report: dict[str, Any]) -> str:
    return str((report.get("reference") or {}).get("kind"))


def report_sheets(report: dict[str, Any]) -> tuple[Sheet, ...]:
    sheets = [_case_sheet(report)]
    if report["memory"]:
        sheets.append(memory_sheet(report["memory"]))
    if report["rounding"]:
        sheets.insert(1, _rounding_sheet(report))
    sheets[1:1] = [*measure_sheets(report), *loss_sheets(report["loss"])]
    failures = [(case["name"], told) for case in report["cases"] for told in case["failures"]]
    if failures:
        sheets.insert(0, Sheet("Gates not met", ("case", "what"), failures))
    if report["notes"]:
        sheets.append(Sheet("Notes", ("",), [(note,) for note in report["notes"]]))
    return tuple(sheets)


def report_refusal(report: dict[str, Any]) -> MlaDeployError | None:
    """GateError VAL-GATE with the whole report in its details, or None when all gates were met."""
    if report["passed"]:
        return None
    failed = [case for case in report["cases"] if not case["passed"]]
    first = f"{failed[0]['name']}: {failed[0]['failures'][0]}" if failed else _other(report)
    return GateError(
        "VAL-GATE",
        f"{len(failed)} of {len(report['cases'])} cases failed; {first}",
        hint="do not deploy this bundle; export it again, and if it fails again report it with "
        "`--report` and the checkpoint's config.json",
        report=report,
    )


def memory_sheet(memory: dict[str, Any]) -> Sheet:
    """Predicted against measured, where both exist."""
    tokens = f"{memory['capacity_tokens']:,} tokens"
    per_token = memory["predicted_bytes_per_token"]
    cache, expanded = memory["cache_bytes"], memory["expanded_cache_bytes"]
    rows = [
        ("cache, a token", f"{per_token:,}", f"{cache // memory['capacity_tokens']:,}", ""),
        (f"cache, {tokens}", f"{memory['predicted_cache_bytes']:,}", f"{cache:,}",
         byte_text(cache)),
        ("the same as expanded heads", f"{expanded:,}", "-", f"{expanded / cache:.1f}x more"),
        ("weight file", "-", f"{memory['weight_file_bytes']:,}",
         byte_text(memory["weight_file_bytes"])),
        ("sessions, besides the weights", "-", f"{memory['session_private_bytes']:,}",
         byte_text(memory["session_private_bytes"])),
    ]  # fmt: skip
    return Sheet("Memory, in bytes", ("what", "#predicted", "#measured", "#"), rows)


def _rounding_sheet(report: dict[str, Any]) -> Sheet:
    """What half precision costs; the cases are held against the source rounded alike."""
    rounding = report["rounding"]
    row = (f"{rounding['positions']:,}", _number(rounding["mean_kl"]), _number(rounding["rel_l2"]),
           "ok" if rounding["passed"] else "FAILED")  # fmt: skip
    bound = ("at most", _number(rounding["wanted_mean_kl"]), "", "")
    title = f"Rounding to {report['dtype']}, against the fp32 source"
    return Sheet(title, ("#positions", "#mean KL", "#relative L2", ""), [row, bound])


def _case_sheet(report: dict[str, Any]) -> Sheet:
    gates = report["gates"]
    rows = [_group_row(cases) for cases in case_groups(report["cases"])]
    bounds = [case["max_abs_bound"] for case in report["cases"] if case["max_abs_bound"]]
    rows.append((
        "at most", "", "", _number(max(bounds, default=None)), _number(gates["mean_kl"]),
        f"{1 - gates['top1']:.0%}", _number(gates["cache_rel_l2"]), "",
    ))  # fmt: skip
    return Sheet(
        f"Cases ({report['dtype']}; logits: max diff, KL; last line: the gates)", _COLUMNS, rows
    )


def _group_row(cases: list[dict[str, Any]]) -> tuple[object, ...]:
    """The worst of each figure; one case is a group of one."""
    first = cases[0]
    return (
        group_name(cases),
        first["batch"],
        first["tokens"],
        _number(worst(cases, "logits", "max_abs")),
        _number(worst(cases, "logits", "mean_kl")),
        _number(worst(cases, "logits", "flips")),
        _number(worst(cases, "cache", "worst_rel_l2")),
        "ok" if first["passed"] else "FAILED",
    )


def _other(report: dict[str, Any]) -> str:
    if not report["top1"]["passed"]:
        return f"top-1 agreement is {report['top1']['share']:.2%}"
    if report["rounding"] and not report["rounding"]["passed"]:
        return (
            f"rounding to {report['dtype']} costs a mean KL of {report['rounding']['mean_kl']:.2g}"
        )
    for name, told in (("text", "the text"), ("uncached", "cached against uncached")):
        if report[name] and not report[name]["passed"]:
            return f"{told} leaves its gate"
    if report["loss"] and report["loss"]["failures"]:
        return f"quantised weights: {report['loss']['failures'][0]}"
    return "the cache does not take the bytes that were predicted"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"
