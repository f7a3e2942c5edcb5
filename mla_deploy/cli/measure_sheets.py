"""What a validation report measures beside its cases: over all, on a text, cached against uncached,
and where a bisection ended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mla_deploy.cli.output import Sheet


def measure_sheets(report: dict[str, Any]) -> Iterator[Sheet]:
    """Those that the report has."""
    if report["metrics"]:
        yield _metrics(report["metrics"])
    if report["text"]:
        yield _text(report["text"])
    if report["uncached"]:
        yield _uncached(report["uncached"])
    if report["bisect"]:
        yield _bisect(report["bisect"])


def _metrics(found: dict[str, Any]) -> Sheet:
    names = ("max_abs", "rel_l2", "mean_kl", "p999_kl")
    row = (
        f"{found['positions']:,}",
        *(_number(found[name]) for name in names),
        f"{found['top1']:.2%}",
        f"{found['near_ties']:,}",
    )
    heads = ("#positions", "#max diff", "#relative L2", "#mean KL", "#p99.9 KL", "#top-1", "#ties")
    return Sheet("Over all cases", heads, [row])


def _text(found: dict[str, Any]) -> Sheet:
    wanted = found["wanted"]
    row = (
        f"{found['tokens']:,}",
        _number(found["perplexity_reference"], 5),
        _number(found["perplexity_bundle"], 5),
        _number(found["ratio"], 6),
        _number(found["mean_kl"]),
        _number(found["p999_kl"]),
        f"{found['top1']:.2%}",
        "ok" if found["passed"] else "FAILED",
    )
    bound = ("at most", "", "", _number(wanted["perplexity_ratio"], 6), _number(wanted["mean_kl"]),
             "", "", "")  # fmt: skip
    heads = ("#tokens", "#reference", "#bundle", "#ratio", "#mean KL", "#p99.9 KL", "#top-1", "")
    return Sheet(f"Perplexity on {found['name']}", heads, [row, bound])


def _uncached(found: dict[str, Any]) -> Sheet:
    row = (f"{found['positions']:,}", _number(found["max_abs"]), _number(found["wanted"]),
           "ok" if found["passed"] else "FAILED")  # fmt: skip
    heads = ("#positions", "#max diff", "#at most", "")
    return Sheet("Token by token against one prefill, in the bundle", heads, [row])


def _bisect(found: dict[str, Any]) -> Sheet:
    layer = "outside the layers" if found["layer"] is None else str(found["layer"])
    rows = [
        ("case", found["case"]),
        ("graph", found["graph"]),
        ("layer", layer),
        ("node", f"{found['node']} ({found['op_type']})"),
        ("tensor", found["output"]),
        (found["measure"], f"{_number(found['found'])}, wanted at most {_number(found['wanted'])}"),
        ("why", found["reason"]),
        ("runs", str(found["steps"])),
    ]
    return Sheet("The first place that leaves the gate", ("", ""), rows)


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}g}"
