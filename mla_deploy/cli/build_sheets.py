"""A planned and a finished build as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mla_deploy.cli.output import Outcome, Sheet, byte_text
from mla_deploy.errors import MlaDeployError

if TYPE_CHECKING:
    from mla_deploy.engine.pipeline import BuildPlan, EngineBuild


def planned_outcome(planned: BuildPlan) -> Outcome:
    """What `--dry-run` prints; refused for what the linter found, as the build would be."""
    memory = byte_text(planned.predicted.host_bytes)
    return Outcome(
        f"{planned.bundle.path}: would build for {planned.target.name} with {planned.package}, "
        f"{memory} of host memory at most",
        {"dry_run": True, **planned.to_dict()},
        _plan_sheets(planned),
        _lint_refusal(planned),
    )


def built_outcome(made: EngineBuild, seconds: float) -> Outcome:
    """What a finished build prints. Nothing of it has run on a GPU, and the summary says so."""
    over = sum(1 for line in made.audit if not line.passed)
    audited = f"{over} limits of the audit passed over" if over else "audit passed"
    plans = byte_text(sum(graph.plan_bytes for graph in made.report.graphs))
    return Outcome(
        f"built {made.bundle.path} for {made.plan.target.name} (SM {', '.join(made.plan.sms)}) in "
        f"{seconds:.1f} s: {plans} of plans, {audited if made.audit else 'not audited'}; "
        "not run on a GPU",
        {"dry_run": False, **made.to_dict()},
        _build_sheets(made),
    )


def _plan_sheets(planned: BuildPlan) -> tuple[Sheet, ...]:
    """Profiles with their predicted activations, bytes, and what the linter found."""
    predicted = planned.predicted
    profiles = [
        (str(profile), f"{predicted.activation_bytes[str(profile)]:,}",
         byte_text(predicted.activation_bytes[str(profile)]))
        for found in planned.profiles.values() for profile in found
    ]  # fmt: skip
    figures = [("weights", predicted.weights_bytes), ("plans, at most", predicted.plan_bytes),
               ("host memory of the build, at most", predicted.host_bytes)]  # fmt: skip
    sheets = [
        Sheet("Profiles, and the activations predicted for each", ("profile", "#bytes", "#"),
              profiles),
        Sheet("Predicted bytes", ("what", "#bytes", "#"),
              [(what, f"{size:,}", byte_text(size)) for what, size in figures]),
    ]  # fmt: skip
    findings = [
        (graph, finding.where, f"{finding.found}, wanted {finding.wanted}; {finding.fix}")
        for graph, found in planned.findings.items() for finding in found
    ]  # fmt: skip
    if findings:
        sheets.insert(0, Sheet("What the linter refuses", ("graph", "where", "what"), findings))
    if planned.missing:
        sheets.append(Sheet("Not built here", ("",), [(planned.missing,)]))
    return tuple(sheets)


def _lint_refusal(planned: BuildPlan) -> MlaDeployError | None:
    """The error that `build` would raise for what the linter found, or None."""
    from mla_deploy.engine.lint import require_clean

    try:
        for graph, found in planned.findings.items():
            require_clean(found, f"{graph}.onnx")
    except MlaDeployError as error:
        return error
    return None


def _build_sheets(made: EngineBuild) -> tuple[Sheet, ...]:
    """The engines, and every limit of the audit."""
    engines = [
        (graph.graph, profile.profile, _count(profile.activation_bytes),
         f"{graph.plan_bytes:,}", len(profile.kernels), f"{graph.build_seconds:.1f}",
         byte_text(graph.peak_host_bytes))
        for graph in made.report.graphs for profile in graph.profiles
    ]  # fmt: skip
    columns = ("graph", "profile", "#activations", "#plan", "#kernels", "#s", "#host memory")
    sheets = [Sheet(f"Engines ({made.report.package} {made.report.version})", columns, engines)]
    warnings = [
        (graph.graph, warning) for graph in made.report.graphs for warning in graph.warnings
    ]
    if made.audit:
        lines = [
            (line.graph, line.rule, f"{line.value:,}", f"{line.limit:,}",
             "ok" if line.passed else "OVER", line.told)
            for line in made.audit
        ]  # fmt: skip
        sheets.append(Sheet("Audit", ("graph", "rule", "#found", "#at most", "", "what"), lines))
    if warnings:
        sheets.append(Sheet("TensorRT's warnings", ("graph", "what"), warnings))
    return tuple(sheets)


def _count(size: int | None) -> str:
    return "-" if size is None else f"{size:,}"
