"""One ONNX graph to one plan: asks the worker, and turns its refusals into errors of ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mla_deploy.bundle import Bundle
from mla_deploy.engine.messages import log_errors, node_errors
from mla_deploy.engine.plugin_graph import plugin_graph
from mla_deploy.engine.profiles import BuildProfile
from mla_deploy.engine.report import GraphReport, Kernel, NodeError, ProfileReport
from mla_deploy.engine.request import BuildRequest
from mla_deploy.engine.supervise import Progress, run_worker
from mla_deploy.errors import (
    EnvironmentFailure,
    IncompatibleError,
    InputError,
    MlaDeployError,
    quoted,
)
from mla_deploy.rewrite.releases import find_release

_SHOWN = 3


@dataclass(frozen=True)
class Recipe:
    """How plans are built: what is the same for both graphs. `timeout` is in seconds for each."""

    package: str
    release: str
    sms: tuple[str, ...]
    weight_streaming: bool = False
    plugin_library: str | None = None
    timeout: float | None = None


@dataclass(frozen=True)
class BuiltGraph:
    """The report of one engine, and the version of what built it."""

    report: GraphReport
    version: str


def build_graph(
    bundle: Bundle,
    profiles: Sequence[BuildProfile],
    recipe: Recipe,
    folder: Path,
    progress: Progress | None = None,
) -> BuiltGraph:
    """Build the graph that `profiles` are for, as `<graph>.plan` in `folder`. Raises as
    `build_engine`; IntegrityError BUN-CHANGED."""
    graph = profiles[0].graph
    for name in bundle.weight_files:
        bundle.file(name)
    overrides = find_release(recipe.release).has_plugin_override
    bare = graph == "decode" and recipe.plugin_library is not None and not overrides
    request = BuildRequest(
        package=recipe.package,
        release=recipe.release,
        onnx=str(bundle.graph(graph)),
        plan=str(folder / f"{graph}.plan"),
        sms=recipe.sms,
        profiles=tuple(profile.shapes(bundle.inputs(graph)) for profile in profiles),
        weight_streaming=recipe.weight_streaming,
        plugin_library=recipe.plugin_library,
    )

    def report(stage: str, done: int, total: int) -> None:
        if progress is not None and stage != "parsing":
            progress(f"building {graph}", done, total)

    names = [str(profile) for profile in profiles]
    if not bare:
        return build_engine(request, names, timeout=recipe.timeout, progress=report)
    with plugin_graph(bundle) as path:
        request = replace(request, onnx=str(path))
        return build_engine(request, names, timeout=recipe.timeout, progress=report)


def build_engine(
    request: BuildRequest,
    profiles: Sequence[str],
    *,
    timeout: float | None = None,
    progress: Progress | None = None,
) -> BuiltGraph:
    """The plan that `request` asks for. `profiles` names its profiles in the report.

    Raises: InputError BLD-PARSE, BLD-PROFILE, BLD-PLUGIN; IncompatibleError BLD-BUILD, BLD-VERSION;
    EnvironmentFailure BLD-RUNTIME, BLD-CRASH, BLD-TIMEOUT.
    """
    result = run_worker(request, timeout=timeout, progress=progress)
    if not result["ok"]:
        raise _refusal(request, result)
    found = zip(profiles, result["activation_bytes"], result["kernels"], strict=True)
    graph = Path(request.onnx).stem
    return BuiltGraph(
        GraphReport(
            graph=graph,
            parse_seconds=result["parse_seconds"],
            build_seconds=result["build_seconds"],
            weights_bytes=result["weights_bytes"],
            plan_bytes=result["plan_bytes"],
            peak_host_bytes=result["peak_bytes"],
            layers=result["layers"],
            profiles=tuple(
                ProfileReport(name, size, tuple(map(_kernel, kernels)))
                for name, size, kernels in found
            ),
            warnings=tuple(result["warnings"]),
        ),
        result["version"],
    )


def _kernel(told: dict[str, Any]) -> Kernel:
    dims = {
        side: tuple(tuple(sizes) for sizes in told[side])
        for side in ("inputs", "constants", "outputs")
    }
    return Kernel(told["name"], told["type"], **dims)


def _refusal(request: BuildRequest, result: dict[str, Any]) -> MlaDeployError:
    kind, told = result["kind"], list(result["told"])
    name, library = quoted(Path(request.onnx).name), request.package
    if kind == "import":
        return EnvironmentFailure(
            "BLD-RUNTIME",
            f"{library} cannot be loaded: {quoted(told[0])}",
            hint="`mla-deploy doctor` shows what is installed",
        )
    if kind == "version":
        return IncompatibleError(
            "BLD-VERSION",
            f"the graph is lowered for TensorRT {request.release}, here is {library} {told[0]}",
            hint="export for the release that is on the device; a plan of one does not run on "
            "another",
            found=told[0],
            wanted=request.release,
        )
    if kind == "plugin":
        return InputError(
            "BLD-PLUGIN",
            f"{quoted(request.plugin_library)} registers no plugin{_because(log_errors(told))}",
            hint="build the library for this TensorRT; see plugins/mla_decode",
        )
    if kind == "parse":
        errors, code = node_errors(result["errors"], told), "BLD-PARSE"
        what = f"{library} does not take {name}"
    else:
        errors, code = log_errors(told), "BLD-BUILD"
        what = f"{library} cannot build {name}"
    if kind == "profile":
        code, what = "BLD-PROFILE", f"profile {result['profile']} of {name} is not taken"
    kind_of_error = IncompatibleError if code == "BLD-BUILD" else InputError
    fixes = [error.fix for error in errors if error.fix]
    return kind_of_error(
        code,
        f"{what}: {_listed(errors)}",
        hint=fixes[0] if fixes else "report it with the details of --json",
        errors=[asdict(error) for error in errors],
        log=result["log"],
        peak_host_bytes=result["peak_bytes"],
    )


def _listed(errors: Sequence[NodeError]) -> str:
    shown = "; ".join(_line(error) for error in errors[:_SHOWN])
    more = f"; and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
    return f"{shown or 'it gave no reason'}{more}"


def _line(error: NodeError) -> str:
    return f"{error.where}: {error.message}" if error.where else error.message


def _because(errors: Sequence[NodeError]) -> str:
    return f": {errors[0].message}" if errors else ""
