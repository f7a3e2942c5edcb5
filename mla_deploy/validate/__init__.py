"""Is a bundle equal to its PyTorch source? Multi-step cases, gates by dtype, memory, a report."""

from mla_deploy.callable_package import make_callable
from mla_deploy.validate.bundle_check import validate
from mla_deploy.validate.cases import Call, Case, default_cases
from mla_deploy.validate.outputs import (
    check_destination,
    read_report,
    write_html,
    write_json,
    write_junit,
    write_markdown,
    write_report,
)
from mla_deploy.validate.record import judge_results, record
from mla_deploy.validate.report import ValidationReport

__all__ = [
    "Call",
    "Case",
    "ValidationReport",
    "check_destination",
    "default_cases",
    "judge_results",
    "read_report",
    "record",
    "validate",
    "write_html",
    "write_json",
    "write_junit",
    "write_markdown",
    "write_report",
]

make_callable(__name__, validate)
