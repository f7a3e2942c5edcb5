"""Bundle to engines: what will be built, is it sound, will it fit; then build, audit, publish."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mla_deploy import __version__
from mla_deploy.bundle import Bundle, EngineStage, check_engine_output, open_bundle, stage_engine
from mla_deploy.bundle.content import record_of_descriptor
from mla_deploy.door import open_folder
from mla_deploy.engine.audit import AuditLine, audit
from mla_deploy.engine.build_graph import Recipe, build_graph
from mla_deploy.engine.built_on import built_on
from mla_deploy.engine.estimate import Estimate, estimate, require_disk, require_room
from mla_deploy.engine.lint import lint_graph, require_clean
from mla_deploy.engine.lint_finding import LintFinding
from mla_deploy.engine.plugin_graph import calls_plugin
from mla_deploy.engine.profiles import GRAPHS, BuildProfile, Graph, bundle_profiles
from mla_deploy.engine.report import BuildReport
from mla_deploy.errors import EnvironmentFailure, GateError, InputError, quoted
from mla_deploy.machine import gpu_rows
from mla_deploy.rewrite.releases import find_release
from mla_deploy.targets import Target, find_target
from mla_deploy.trust import remember

Progress = Callable[[str, int, int], None]
AuditMode = Literal["off", "warn", "fail"]
PluginMode = Literal["auto", "on", "off"]

PLUGIN_OPERATOR = "mla_deploy::MlaDecode"
# What TensorRT-RTX 1.7 compiles for; it has no other.
RTX_SMS = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")


@dataclass(frozen=True)
class BuildPlan:
    """What a build would do. `package` is the library that builds, `missing` why it cannot here."""

    bundle: Bundle
    target: Target
    release: str
    package: str
    sms: tuple[str, ...]
    profiles: Mapping[Graph, tuple[BuildProfile, ...]]
    predicted: Estimate
    findings: Mapping[Graph, tuple[LintFinding, ...]]
    missing: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, texts and numbers."""
        return {
            "target": self.target.name,
            "release": self.release,
            "package": self.package,
            "sms": list(self.sms),
            "profiles": {g: [p.to_dict() for p in found] for g, found in self.profiles.items()},
            "predicted": asdict(self.predicted),
            "findings": {g: [asdict(f) for f in found] for g, found in self.findings.items()},
            "builds_here": not self.missing,
            "missing": self.missing,
        }


@dataclass(frozen=True)
class EngineBuild:
    """A finished build: the bundle with its engines, the report and the audit of it."""

    bundle: Bundle
    plan: BuildPlan
    report: BuildReport
    audit: tuple[AuditLine, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, texts and numbers."""
        return {
            **self.plan.to_dict(),
            "path": str(self.bundle.path),
            "digest": self.bundle.digest,
            "engine_digest": self.bundle.engine.digest if self.bundle.engine else "",
            "report": self.report.to_dict(),
            "audit": [line.to_dict() for line in self.audit],
        }


def plan_build(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    profiles: Sequence[str | BuildProfile] = (),
    sms: Sequence[str] = (),
) -> BuildPlan:
    """What `build` would do with the same arguments; needs no TensorRT.

    Raises: as `open_bundle`; InputError BLD-TARGET, BLD-PROFILE, BLD-SM, BLD-LINT (a graph that is
    no model).
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle, engine=False)
    target = find_target(str(opened.manifest["target"]))
    if target.release is None:
        raise InputError(
            "BLD-TARGET",
            f"the bundle was exported for {target.name}, which runs on {target.runtime}: there is "
            "no engine to build",
            hint="export with `--target rtx-40`, whose engines build here, or for your device",
            target=target.name,
        )
    release = find_release(target.release)
    package = "tensorrt_rtx" if target.release.startswith("rtx-") else "tensorrt"
    chosen = bundle_profiles(opened, profiles)
    gpus = _sms(target, package, sms)
    findings = {
        graph: lint_graph(
            opened.graph(graph),
            release,
            [profile.shapes(opened.inputs(graph)) for profile in chosen[graph]],
            gpus,
        )
        for graph in GRAPHS
    }
    return BuildPlan(
        opened, target, target.release, package, gpus, chosen, estimate(opened, chosen), findings,
        _missing(package, target),
    )  # fmt: skip


def build(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    profiles: Sequence[str | BuildProfile] = (),
    sms: Sequence[str] = (),
    plugin: PluginMode = "auto",
    plugin_library: str | os.PathLike[str] | None = None,
    weight_streaming: bool = False,
    audit_mode: AuditMode = "fail",
    limits: Mapping[str, int] | None = None,
    timeout: float | None = None,
    replace: bool = False,
    progress: Progress | None = None,
) -> EngineBuild:
    """Build both engines of a bundle into its folder `engine/`.

    `profiles`: see `profiles.py`. `sms`: compute capabilities ("8.9"), TensorRT-RTX only. `timeout`
    is in seconds for each engine. `limits` replaces limits of the audit by name.

    Raises: as `plan_build`; BusyError BUN-EXISTS, BUN-BUSY; InputError BLD-LINT, BLD-PLUGIN,
    BLD-PARSE, BLD-IN-PLACE; IncompatibleError BLD-BUILD, BLD-VERSION; EnvironmentFailure
    BLD-RUNTIME, BLD-MEMORY, BLD-DISK, BLD-CRASH, BLD-TIMEOUT; GateError BLD-AUDIT.
    """
    planned = plan_build(bundle, profiles=profiles, sms=sms)
    if planned.missing:
        raise _no_runtime(planned)
    library = _plugin(planned, plugin, plugin_library)
    for graph, findings in planned.findings.items():
        left = [f for f in findings if library is None or not _is_plugin_node(f)]
        require_clean(left, f"{graph}.onnx")
    home = Path(os.path.realpath(planned.bundle.path))
    check_engine_output(home, replace=replace)
    require_room(planned.predicted.host_bytes)
    require_disk(home.parent, planned.predicted.plan_bytes)
    recipe = Recipe(
        planned.package, planned.release, planned.sms, weight_streaming, library, timeout
    )
    with stage_engine(planned.bundle, replace=replace) as stage:
        report = _built(planned, recipe, stage, progress)
        lines = () if audit_mode == "off" else _audited(planned, report, limits, audit_mode)
        made = stage.publish(_record(planned, report, lines, recipe))
    if made.engine is not None:
        remember(made.engine.digest, "built")
    return EngineBuild(made, planned, report, lines)


def _built(
    planned: BuildPlan, recipe: Recipe, stage: EngineStage, progress: Progress | None
) -> BuildReport:
    """Both plans, in the stage."""
    built = []
    for graph in GRAPHS:
        profiles = planned.profiles[graph]
        built.append(build_graph(planned.bundle, profiles, recipe, stage.path, progress))
        stage.adopt(f"{graph}.plan")
    graphs = tuple(made.report for made in built)
    return BuildReport(planned.package, built[0].version, planned.release, planned.sms, graphs)


def _audited(
    planned: BuildPlan, report: BuildReport, limits: Mapping[str, int] | None, mode: AuditMode
) -> tuple[AuditLine, ...]:
    lines = audit(report, planned.bundle, planned.predicted, limits)
    failed = [line for line in lines if not line.passed]
    if failed and mode == "fail":
        first = failed[0]
        raise GateError(
            "BLD-AUDIT",
            f"{len(failed)} of {len(lines)} limits passed over: {first.graph} {first.rule} is "
            f"{first.value:,}, at most {first.limit:,} ({first.told})",
            hint="--audit warn keeps the engines; nothing was written",
            audit=[line.to_dict() for line in lines],
            report=report.to_dict(),
        )
    return lines


def _record(
    planned: BuildPlan, report: BuildReport, lines: tuple[AuditLine, ...], recipe: Recipe
) -> dict[str, Any]:
    """engine.json without its seal and its list of files."""
    return {
        "tool": {"name": "mla-deploy", "version": __version__},
        "bundle_digest": planned.bundle.digest,
        "target": planned.target.name,
        "dtype": planned.bundle.manifest["dtype"],
        "release": planned.release,
        "runtime": {"package": report.package, "version": report.version},
        "sms": list(planned.sms),
        "device": built_on(report.package),
        "gpus": gpu_rows() if planned.package == "tensorrt" else [],  # it builds for these
        "options": {
            "weight_streaming": recipe.weight_streaming,
            "plugin": _plugin_record(recipe.plugin_library),
        },
        "graphs": {
            graph: {
                "plan": f"{graph}.plan",
                "profiles": [
                    {"axes": profile.to_dict()["axes"],
                     "shapes": {name: {"min": list(low), "opt": list(best), "max": list(high)}
                                for name, (low, best, high) in
                                profile.shapes(planned.bundle.inputs(graph)).items()}}
                    for profile in planned.profiles[graph]
                ],
            }
            for graph in GRAPHS
        },
        "predicted": asdict(planned.predicted),
        "report": report.to_record(),
        "audit": [line.to_dict() for line in lines],
    }  # fmt: skip


def _sms(target: Target, package: str, asked: Sequence[str]) -> tuple[str, ...]:
    own = (target.sm,) if target.sm is not None else ()
    chosen = tuple(dict.fromkeys(asked)) or own
    known = RTX_SMS if package == "tensorrt_rtx" else own
    unknown = [sm for sm in chosen if sm not in known]
    if unknown:
        told = "TensorRT builds for the GPU it runs on, which is" if package == "tensorrt" else (
            "TensorRT-RTX compiles for")  # fmt: skip
        raise InputError(
            "BLD-SM",
            f"SM {quoted(unknown[0])} cannot be built for; {told} {', '.join(known)}",
            hint="leave --sm out to build for the target's own GPU",
        )
    return chosen


def _missing(package: str, target: Target) -> str:
    """Why a build cannot run here, "" when it can."""
    if importlib.util.find_spec(package) is not None:
        return ""
    if package == "tensorrt_rtx":
        return "tensorrt_rtx is not installed: `pip install 'mla-deploy[tensorrt]'`"
    return (
        f"{target.runtime} is not installed: it comes with the device ({target.name}) and builds "
        "only there"
    )


def _no_runtime(planned: BuildPlan) -> EnvironmentFailure:
    hint = "--dry-run shows what would be built"
    if planned.package == "tensorrt":
        hint = (
            "`mla-deploy build BUNDLE --package DIR` makes what to copy to the device and build "
            "there; a bundle exported with `--target rtx-40` builds here, with no GPU"
        )
    return EnvironmentFailure("BLD-RUNTIME", planned.missing, hint=hint, package=planned.package)


def _plugin(
    planned: BuildPlan, mode: PluginMode, library: str | os.PathLike[str] | None
) -> str | None:
    """The plugin library to build with, None to build the function of plain operators.

    Raises: InputError BLD-PLUGIN (it is not there; or asked for, and the graph has no place).
    """
    reason = "no library is given" if library is None and mode == "on" else ""
    if library is not None and mode != "off":
        if not os.path.isfile(library):
            reason = f"there is no library {quoted(os.fspath(library))}"
        elif not calls_plugin(planned.bundle.graph("decode")):
            if mode == "auto":
                return None
            reason = "the decode graph calls no MlaDecode"
    if reason:
        raise InputError(
            "BLD-PLUGIN",
            f"the plugin cannot be used: {reason}",
            hint="build plugins/mla_decode and pass --plugin-library, or --plugin off",
        )
    return None if library is None or mode == "off" else os.path.realpath(library)


def _is_plugin_node(finding: LintFinding) -> bool:
    return finding.check == "operator" and finding.found.endswith(f" {PLUGIN_OPERATOR}")


def _plugin_record(library: str | None) -> dict[str, Any] | None:
    """What an engine with plugins is bound to: the library's name and bytes."""
    if library is None:
        return None
    path = Path(library)
    with open_folder(path.parent) as folder:
        descriptor = folder.open(path.name, "checkpoint")
        try:
            return {"file": path.name, **record_of_descriptor(descriptor).to_dict()}
        finally:
            os.close(descriptor)
