"""Judges the report.json that verify.py wrote on a device, on any machine.

The report is held against the bundle, not against itself: gates, memory limits and cache bytes come
from here, and its own verdict counts only when it is no.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mla_deploy.bundle import Bundle, open_bundle
from mla_deploy.bundle.manifest import is_intact
from mla_deploy.device.files import FORMAT
from mla_deploy.device.numbers import broken_gates
from mla_deploy.device_package.write import activation_limit
from mla_deploy.door import open_folder
from mla_deploy.engine.estimate import activation_bytes
from mla_deploy.engine.profiles import bundle_profiles
from mla_deploy.errors import GateError, IncompatibleError, InputError, IntegrityError, quoted
from mla_deploy.runtime.cache_spec import spec_from_manifest
from mla_deploy.strict_json import parse_json
from mla_deploy.targets import find_target
from mla_deploy.validate.gates import gate_for

_MAX_REPORT_BYTES = 16 << 20
_MAX_VALUES = 200_000
_NUMBERS = ("positions", "max_abs", "largest_logit", "rel_l2", "mean_kl", "flips", "near_ties",
            "cache_rel_l2")  # fmt: skip


@dataclass(frozen=True)
class VerdictLine:
    """One thing that was to be shown. `status`: passed, failed or not run."""

    name: str
    status: str
    told: str


@dataclass(frozen=True)
class DeviceVerdict:
    """What a device's report shows of a bundle. `device` is what ran it, in the report's words."""

    bundle_digest: str
    package_digest: str
    device: str
    tensorrt: str
    golden_from: str
    lines: tuple[VerdictLine, ...]

    @property
    def passed(self) -> bool:
        """Nothing failed, and numbers ran."""
        shown = any(x.name.startswith("numbers") and x.status == "passed" for x in self.lines)
        return shown and all(line.status != "failed" for line in self.lines)

    @property
    def refusal(self) -> GateError | None:
        """VAL-DEVICE where the answer is no."""
        if self.passed:
            return None
        bad = [line for line in self.lines if line.status == "failed"]
        bad = bad or [line for line in self.lines if line.status == "not run"]
        first = f"{bad[0].name}: {bad[0].told}" if bad else "it holds no numbers"
        return GateError(
            "VAL-DEVICE",
            f"the device's report does not show that the engines are right: {first}",
            hint="the table has every line; run verify.py again on the device once it is mended",
            lines=[asdict(line) for line in self.lines],
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and texts."""
        return {**asdict(self), "passed": self.passed}


def judge_report(
    bundle: str | os.PathLike[str] | Bundle, report: str | os.PathLike[str]
) -> DeviceVerdict:
    """The verdict on `report` for `bundle`; no is a verdict whose `passed` is false.

    Raises: as `open_bundle`; InputError VAL-REPORT (no such report, or none in form), FILE-*;
    IntegrityError VAL-REPORT (other bytes than were written, or of another bundle);
    IncompatibleError VAL-REPORT (a newer form), VAL-DTYPE.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle, engine=False)
    facts = _read(report)
    if facts["bundle_digest"] != opened.digest:
        raise IntegrityError(
            "VAL-REPORT",
            f"the report is of bundle {quoted(facts['bundle_digest'])}, this one is "
            f"{opened.digest}",
            hint="name the bundle that the device package was made from",
            found=quoted(facts["bundle_digest"]),
            wanted=opened.digest,
        )
    rows = [
        _Row(str(row["name"]), str(row["status"]), str(row["told"]), row["figures"])
        for row in facts["checks"]
    ]
    lines = [*_device_lines(opened, facts), *(_line(opened, row) for row in rows)]
    if not any(row.name.startswith("numbers") for row in rows):
        lines.append(VerdictLine("numbers", "not run", "the report has none"))
    return DeviceVerdict(
        bundle_digest=opened.digest,
        package_digest=str(facts["package_digest"]),
        device=quoted(facts["device"].get("name")).strip("'"),
        tensorrt=quoted(f"{facts['tensorrt']['package']} {facts['tensorrt']['version']}").strip(
            "'"
        ),
        golden_from=str(facts["golden_from"]),
        lines=tuple(lines),
    )


@dataclass(frozen=True)
class _Row:
    """One check as the report has it."""

    name: str
    status: str
    told: str
    figures: Mapping[str, Any]


def _line(bundle: Bundle, row: _Row) -> VerdictLine:
    judge = _JUDGES.get(row.name.split()[0]) if row.name else None
    told = quoted(row.told).strip("'\"")
    if row.status != "passed":
        status = row.status if row.status in ("failed", "not run") else "failed"
        return VerdictLine(row.name, status, told)
    try:
        broken = judge(bundle, row) if judge is not None else []
    except (KeyError, TypeError, ValueError, InputError) as problem:
        broken = [f"its figures are not in form ({quoted(problem)})"]
    return VerdictLine(row.name, "failed" if broken else "passed", "; ".join(broken) or told)


def _numbers(bundle: Bundle, row: _Row) -> list[str]:
    """Gates of our own, and the bytes that the caches took."""
    found = {name: _number(row.figures[name]) for name in _NUMBERS}
    told = broken_gates(found, gate_for(str(bundle.manifest["dtype"])).to_dict())
    if found["positions"] < 1:
        told.append("no position was compared")
    cache, batch = bundle.manifest["cache"], int(row.figures["batch"])
    wanted = spec_from_manifest(bundle.manifest).bytes(batch, int(cache["capacity"]))
    if row.figures["cache_bytes"] != wanted:
        told.append(f"the caches took {row.figures['cache_bytes']} bytes, wanted {wanted}")
    return told


def _memory(bundle: Bundle, row: _Row) -> list[str]:
    """The limit is worked out here from the profile's own text."""
    graph = row.name.split()[1]
    profiles = bundle_profiles(bundle, [str(row.figures["profile"])])
    profile = next(p[0] for g, p in profiles.items() if g == graph)
    limit = activation_limit(activation_bytes(bundle, profile))
    found = row.figures["found"]
    if not isinstance(found, int) or not 0 <= found <= limit:
        return [f"{quoted(found)} bytes of activations, at most {limit:,}"]
    return []


_JUDGES: dict[str, Callable[[Bundle, _Row], list[str]]] = {"numbers": _numbers, "memory": _memory}


def _device_lines(bundle: Bundle, facts: Mapping[str, Any]) -> Iterator[VerdictLine]:
    """Whether the report is of the kind of device and the release that the bundle is for."""
    target = find_target(str(bundle.manifest["target"]))
    sm, version = str(facts["device"].get("sm")), str(facts["tensorrt"]["version"])
    release = str(target.release)
    fits = release.startswith("rtx-") or sm == target.sm
    yield VerdictLine("target", "passed" if fits else "failed",
                      f"SM {quoted(sm)}, {target.name} has {target.sm}")  # fmt: skip
    line = f"{version}.".startswith(f"{release.removeprefix('rtx-')}.")
    yield VerdictLine("release", "passed" if line else "failed",
                      f"TensorRT {quoted(version)}, lowered for {release}")  # fmt: skip


def _number(value: Any) -> float:
    """Null stands for a distance that was not finite."""
    if value is None:
        return math.inf
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"found {value!r}, wanted a number")
    return value


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The report, its bytes and its form checked."""
    where = Path(path)
    with open_folder(where.parent) as folder:
        text = folder.read_bytes(where.name, "checkpoint", max_bytes=_MAX_REPORT_BYTES)
    facts = parse_json(text, what="report.json", code="VAL-REPORT", max_values=_MAX_VALUES)
    if not isinstance(facts, dict) or "checks" not in facts:
        raise _malformed("it is no report of verify.py")
    if not is_intact(text):
        raise IntegrityError(
            "VAL-REPORT",
            "report.json is not as verify.py wrote it (check differs)",
            hint="copy it again from the device",
        )
    if facts.get("format_version") != FORMAT:
        raise IncompatibleError(
            "VAL-REPORT",
            f"report.json is of form {quoted(facts.get('format_version'))}, wanted {FORMAT}",
            hint="use the mla-deploy that made the package",
        )
    wanted = {"bundle_digest": str, "package_digest": str, "golden_from": str, "device": dict,
              "tensorrt": dict, "checks": list}  # fmt: skip
    for name, kind in wanted.items():
        if not isinstance(facts.get(name), kind):
            raise _malformed(f"{name} is {quoted(facts.get(name))}")
    if not {"package", "version"} <= set(facts["tensorrt"]):
        raise _malformed("tensorrt lacks a package or a version")
    for row in facts["checks"]:
        texts = isinstance(row, dict) and all(
            isinstance(row.get(name), str) for name in ("name", "status", "told")
        )
        if not texts or not isinstance(row.get("figures"), dict):
            raise _malformed(f"a check is {quoted(row)}")
    return facts


def _malformed(reason: str) -> InputError:
    return InputError(
        "VAL-REPORT",
        f"report.json: {reason}",
        hint="it is what verify.py of a device package writes; copy it as it is",
    )
