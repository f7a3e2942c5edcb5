"""`validate --engine`: what can be said of a bundle's engines on this machine.

With the GPU they are for: numbers, device memory and latency, as `verify.py` of a device package
takes them. Without: digests, versions, profiles, the build's own report against the prediction, and
the same graphs on ONNX Runtime where the source is given. What was not run says so.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mla_deploy.bundle import Bundle, EngineRecord, open_bundle
from mla_deploy.checkpoint import Checkpoint
from mla_deploy.device.checks import (
    Checks,
    engine_checks,
    golden_checks,
    latency_checks,
    memory_checks,
)
from mla_deploy.device.contract import Contract
from mla_deploy.device.golden import Golden
from mla_deploy.device_package.golden import golden
from mla_deploy.device_package.judge import VerdictLine
from mla_deploy.device_package.write import activation_limit, bundle_source
from mla_deploy.engine.estimate import activation_bytes
from mla_deploy.engine.profiles import BuildProfile, parse_profile
from mla_deploy.errors import EnvironmentFailure, GateError, IncompatibleError, InputError, quoted
from mla_deploy.runtime.engine_guard import Admitted, admit, engine_contract
from mla_deploy.runtime.tensorrt_runner import load_engines
from mla_deploy.targets import find_target
from mla_deploy.validate import validate
from mla_deploy.validate.gates import gate_for
from mla_deploy.validate.reference import Progress

_STEPS = 50
_ON_DEVICE = ("device io", "device memory", "numbers", "latency")


@dataclass(frozen=True)
class EngineVerdict:
    """`on_device`: whether the engines ran. `why_not` says what was missing."""

    bundle_digest: str
    engine_digest: str
    on_device: bool
    why_not: str
    lines: tuple[VerdictLine, ...]

    @property
    def passed(self) -> bool:
        """Nothing that was checked failed; what was not run is not counted."""
        return all(line.status != "failed" for line in self.lines)

    @property
    def refusal(self) -> GateError | None:
        """VAL-ENGINE where something failed."""
        bad = [line for line in self.lines if line.status == "failed"]
        if not bad:
            return None
        return GateError(
            "VAL-ENGINE",
            f"the engines do not hold: {bad[0].name}: {bad[0].told}",
            hint="build them again, or export with another dtype; --json has every line",
            lines=[asdict(line) for line in self.lines],
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and texts."""
        return {**asdict(self), "passed": self.passed}


def check_engines(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    source: str | os.PathLike[str] | Checkpoint | None = None,
    trust: Sequence[str] = (),
    plugin_library: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> EngineVerdict:
    """Check what can be checked here.

    Raises: as `open_bundle`; InputError ENG-MISSING; IntegrityError ENG-TRUST and the like where a
    GPU is there and the engines may not be loaded; CKPT-*, VAL-SOURCE.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    record = opened.engine
    if record is None:
        raise InputError(
            "ENG-MISSING",
            f"{quoted(opened.path)} has no engines",
            hint="`mla-deploy build BUNDLE` makes them",
        )
    contract = engine_contract(opened, record)
    lines = [*_file_lines(opened, record), *_report_lines(opened, record)]
    with bundle_source(source, opened) as checkpoint:
        if checkpoint is None:
            lines.append(VerdictLine("graphs on ONNX Runtime", "not run", "needs --source"))
        else:
            lines.append(_parity(opened, checkpoint, progress))
        try:
            admitted = admit(opened, trust=trust, plugin_library=plugin_library)
            why_not = ""
        except (EnvironmentFailure, IncompatibleError) as error:
            admitted, why_not = None, error.message
        if admitted is None:
            told = f"not run on a device: {why_not}"
            lines += [VerdictLine(name, "not run", told) for name in _ON_DEVICE]
        else:
            lines += _device_lines((opened, admitted, contract), checkpoint, plugin_library)
    return EngineVerdict(opened.digest, record.digest, admitted is not None, why_not, tuple(lines))


def _file_lines(bundle: Bundle, record: EngineRecord) -> Iterator[VerdictLine]:
    by = "hash" if bundle.verified == "full" else "size"
    count = len(bundle.files) + len(record.files) + 2
    yield VerdictLine("files", "passed", f"{count} files by {by}; engine.json {record.digest}")
    target = find_target(str(bundle.manifest["target"]))
    version = str(record.facts["runtime"]["version"])
    wanted = str(bundle.manifest["engine"]["release"])
    line = f"{version}.".startswith(f"{wanted.removeprefix('rtx-')}.")
    fits = record.release == wanted and line
    yield _line("release", fits, f"built by {version}, graphs lowered for {wanted}")
    yield _line("sm", target.sm in record.sms,
                f"built for {', '.join(record.sms)}, {target.name} has {target.sm}")  # fmt: skip
    yield VerdictLine("profiles", "passed", "sizes of the manifest's inputs")


def _report_lines(bundle: Bundle, record: EngineRecord) -> Iterator[VerdictLine]:
    """What the builder said of the engines against what is predicted here."""
    report = record.facts.get("report", {})
    for graph in report.get("graphs", ()):
        plan = record.files.get(f"{graph['graph']}.plan")
        told = f"{graph['plan_bytes']:,} bytes reported"
        yield _line(f"plan {graph['graph']}",
                    plan is not None and plan.bytes == graph["plan_bytes"], told)  # fmt: skip
        for row in graph["profiles"]:
            profile, found = parse_profile(row["profile"]), row["activation_bytes"]
            limit = activation_limit(activation_bytes(bundle, profile))
            name = f"activations {row['profile']}"
            if found is None:
                yield VerdictLine(name, "not run", "the builder did not say")
            else:
                yield _line(name, found <= limit, f"{found:,} bytes, at most {limit:,}")
    over = [line for line in record.facts.get("audit", ()) if not line["passed"]]
    if record.facts.get("audit"):
        told = f"{over[0]['graph']} {over[0]['rule']} is {over[0]['value']:,}" if over else (
            f"{len(record.facts['audit'])} limits held")  # fmt: skip
        yield _line("audit", not over, told)
    else:
        yield VerdictLine("audit", "not run", "the engines were built without it")


def _parity(bundle: Bundle, source: Checkpoint, progress: Progress | None) -> VerdictLine:
    """The same graphs on the CPU against the source, over every case of `validate`."""
    report = validate(bundle, source=source, progress=progress)
    bad = [case.name for case in report.cases if not case.passed]
    told = f"{len(report.cases) - len(bad)} of {len(report.cases)} cases equal the source"
    return _line("graphs on ONNX Runtime", report.passed, told)


def _device_lines(
    parts: tuple[Bundle, Admitted, Contract],
    source: Checkpoint | None,
    plugin_library: str | os.PathLike[str] | None,
) -> Iterator[VerdictLine]:
    bundle, admitted, contract = parts
    engines = load_engines(bundle, admitted, plugin_library)
    checks = Checks()
    for graph, engine in engines.items():
        engine_checks(checks, graph, engine, contract)
    profiles = {graph: list(_limits(bundle, contract, graph)) for graph in engines}
    memory_checks(checks, profiles, engines)
    made = golden(bundle, contract, source)
    wanted = Golden(made.cases, io.BytesIO(made.data), made.origin)
    gate = gate_for(str(bundle.manifest["dtype"])).to_dict()
    golden_checks(checks, wanted, gate, (admitted.cuda, engines, contract))
    latency_checks(checks, (admitted.cuda, engines, contract), _STEPS)
    for row in checks.rows:
        yield VerdictLine(str(row["name"]), str(row["status"]), str(row["told"]))


def _limits(bundle: Bundle, contract: Contract, graph: str) -> Iterator[dict[str, Any]]:
    """Name and limit of each profile, from the sizes that it takes."""
    for shapes in contract.profiles[graph]:
        ends = {end: shapes["input_ids"][end] for end in ("min", "opt", "max")}
        axes = [
            f"{axis}={ends['min'][place]}..{ends['max'][place]}@{ends['opt'][place]}"
            for place, axis in enumerate(("batch", "new_tokens"))
        ]
        profile: BuildProfile = parse_profile(f"{graph}:{','.join(axes)}")
        limit = activation_limit(activation_bytes(bundle, profile))
        yield {"name": str(profile), "activation_limit_bytes": limit}


def _line(name: str, passed: bool, told: str) -> VerdictLine:
    return VerdictLine(name, "passed" if passed else "failed", told)
