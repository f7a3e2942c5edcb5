"""`write_package`: a bundle, golden outputs and scripts, as one folder to copy to a device."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mla_deploy import __version__
from mla_deploy.bundle import MANIFEST_NAME, Bundle, refuse_overlap
from mla_deploy.checkpoint import Checkpoint, open_checkpoint
from mla_deploy.device.contract import Contract
from mla_deploy.device.failure import DeviceFailure
from mla_deploy.device.files import FORMAT
from mla_deploy.device_package.build_conf import build_conf
from mla_deploy.device_package.golden import Golden, golden
from mla_deploy.device_package.plugin_files import PluginFiles, add_plugin
from mla_deploy.device_package.stage import PackageStage, stage_package
from mla_deploy.door import open_folder
from mla_deploy.engine.lint import require_clean
from mla_deploy.engine.pipeline import BuildPlan, plan_build
from mla_deploy.engine.profiles import GRAPHS, BuildProfile, Shapes
from mla_deploy.errors import IncompatibleError, InputError, IntegrityError, quoted
from mla_deploy.rewrite.releases import find_release
from mla_deploy.validate.gates import gate_for

_DEVICE = Path(__file__).parents[1] / "device"
_MODULES = "mla_device"
_SCRIPTS = ("build.py", "verify.py")
_SHELL = "build.sh"
_MAX_MANIFEST_BYTES = 8 << 20
# A quarter over the prediction, and what an engine reserves whatever it holds; as in the audit.
_SLACK_BYTES = 4 << 20
_GOLDEN_ROOM = 1 << 30


@dataclass(frozen=True)
class DevicePackage:
    """A written package. `golden_from` is "pytorch" or "onnxruntime"."""

    path: Path
    plan: BuildPlan
    golden_from: str
    cases: tuple[str, ...]
    plugin: PluginFiles
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, texts and numbers."""
        return {
            **self.plan.to_dict(),
            "path": str(self.path),
            "bundle_digest": self.plan.bundle.digest,
            "golden_from": self.golden_from,
            "golden_cases": list(self.cases),
            "plugin": self.plugin.to_dict(),
            "bytes": self.bytes,
        }


def write_package(
    bundle: str | os.PathLike[str] | Bundle,
    out: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | Checkpoint | None = None,
    profiles: Sequence[str | BuildProfile] = (),
    sms: Sequence[str] = (),
    plugin: Literal["auto", "on", "off"] = "auto",
    weight_streaming: bool = False,
) -> DevicePackage:
    """Write the device package of `bundle` at `out`, which must not exist.

    `source` is the checkpoint that golden outputs are taken from; without it they come from the
    bundle's graphs on ONNX Runtime. Nothing in the package has run on its device.
    Raises: as `plan_build`; InputError BLD-LINT, BLD-IN-PLACE, BLD-PLUGIN, PKG-GOLDEN;
    IntegrityError VAL-SOURCE; IncompatibleError PKG-CACHE, VAL-DTYPE; EnvironmentFailure
    PKG-KERNELS, ENV-*; BusyError BUN-EXISTS, BUN-BUSY.
    """
    planned = plan_build(bundle, profiles=profiles, sms=sms)
    opened = planned.bundle
    for graph in GRAPHS:
        require_clean(planned.findings[graph], f"{graph}.onnx")
    if "in_place" in opened.manifest:
        raise InputError(
            "BLD-IN-PLACE",
            f"{quoted(opened.path)} is a bundle beside a checkpoint, which no package can hold",
            hint="export with --out, then package that",
        )
    refuse_overlap(out, opened.path)
    contract = _contract(planned)
    needed = sum(record.bytes for record in opened.files.values()) + _GOLDEN_ROOM
    with (
        stage_package(out, needed_bytes=needed) as stage,
        bundle_source(source, opened) as checkpoint,
    ):
        made = golden(opened, contract, checkpoint)
        found = _plugin(stage, planned, plugin)
        _copy_bundle(stage, opened)
        _write_scripts(stage, planned, found, weight_streaming=weight_streaming)
        stage.write("golden.npz", made.data)
        path = stage.seal(_facts(planned, made, found, weight_streaming=weight_streaming))
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    names = tuple(str(case["name"]) for case in made.cases)
    return DevicePackage(path, planned, made.origin, names, found, size)


def _contract(planned: BuildPlan) -> Contract:
    try:
        return Contract(planned.bundle.manifest, _shapes(planned))
    except DeviceFailure as failure:
        raise IncompatibleError(
            "PKG-CACHE", failure.message, hint="export with `--target cpu`, which runs it"
        ) from None


def _shapes(planned: BuildPlan) -> dict[str, list[dict[str, Any]]]:
    """Minimum, optimum and maximum of every dynamic input, by graph and profile."""
    return {
        graph: [
            {name: {"min": list(low), "opt": list(best), "max": list(high)}
             for name, (low, best, high) in
             profile.shapes(planned.bundle.inputs(graph)).items()}
            for profile in planned.profiles[graph]
        ]
        for graph in GRAPHS
    }  # fmt: skip


def _plugin(stage: PackageStage, planned: BuildPlan, mode: str) -> PluginFiles:
    if mode == "off":
        return PluginFiles(False, False, (), "left out, as asked")
    found = add_plugin(stage, planned.bundle, planned.sms[0], find_release(planned.release))
    if mode == "on" and not (found.called and found.source):
        raise InputError("BLD-PLUGIN", f"--plugin on: {found.told}", hint="leave --plugin out")
    return found


def _copy_bundle(stage: PackageStage, bundle: Bundle) -> None:
    """The bundle as it is, without engines."""
    with open_folder(bundle.path) as folder:
        text = folder.read_bytes(MANIFEST_NAME, max_bytes=_MAX_MANIFEST_BYTES)
    stage.write(f"bundle/{MANIFEST_NAME}", text)
    for name in bundle.files:
        path = bundle.file(name)
        stage.copy(f"bundle/{name}", path.parent, path.name)
    copied = {name: stage.record(f"bundle/{name}").sha256 for name in bundle.files}
    other = [name for name, record in bundle.files.items() if copied[name] != record.sha256]
    if other:
        raise IntegrityError(
            "BUN-CHANGED", f"{quoted(other[0])} changed while it was copied", hint="run it again"
        )


def _write_scripts(
    stage: PackageStage, planned: BuildPlan, plugin: PluginFiles, *, weight_streaming: bool
) -> None:
    for path in sorted(_DEVICE.glob("*.py")):
        if path.name != "start.py":
            stage.copy(f"{_MODULES}/{path.name}", _DEVICE, path.name)
    for name in _SCRIPTS:
        stage.copy(name, _DEVICE, "start.py")
    stage.copy(_SHELL, _DEVICE, _SHELL)
    stage.make_runnable(_SHELL)
    release, bundle = find_release(planned.release), planned.bundle
    shapes: dict[str, list[Shapes]] = {
        graph: [profile.shapes(bundle.inputs(graph)) for profile in planned.profiles[graph]]
        for graph in GRAPHS
    }
    conf = build_conf(
        release, shapes, weight_streaming=weight_streaming, has_plugin=plugin.called,
        weights=bundle.weight_files,
    )  # fmt: skip
    stage.write("build.conf", conf)
    stage.write("README.txt", _readme(planned, plugin).encode("ascii"))


def _facts(
    planned: BuildPlan, made: Golden, plugin: PluginFiles, *, weight_streaming: bool
) -> dict[str, Any]:
    """package.json without its seal and its list of files."""
    predicted, shapes = planned.predicted.activation_bytes, _shapes(planned)
    return {
        "format_version": FORMAT,
        "tool": {"name": "mla-deploy", "version": __version__},
        "bundle_digest": planned.bundle.digest,
        "target": planned.target.name,
        "dtype": planned.bundle.manifest["dtype"],
        "release": planned.release,
        "package": planned.package,
        "sms": list(planned.sms),
        "weight_streaming": weight_streaming,
        "gate": gate_for(str(planned.bundle.manifest["dtype"])).to_dict(),
        "profiles": {
            graph: [
                {"name": str(profile), "shapes": shapes[graph][index],
                 "activation_predicted_bytes": predicted[str(profile)],
                 "activation_limit_bytes": activation_limit(predicted[str(profile)])}
                for index, profile in enumerate(planned.profiles[graph])
            ]
            for graph in GRAPHS
        },
        "golden": {"from": made.origin, "cases": list(made.cases)},
        "plugin": plugin.to_dict(),
    }  # fmt: skip


def activation_limit(predicted_bytes: int) -> int:
    """The most bytes that the activations of a profile may take."""
    return predicted_bytes * 5 // 4 + _SLACK_BYTES


def _readme(planned: BuildPlan, plugin: PluginFiles) -> str:
    build_plugin = (
        "The graphs call a plugin; build it first and name it to each of the three:\n"
        "  cmake -S plugin/mla_decode -B plugin/build && cmake --build plugin/build\n"
        "  ./build.sh --plugin LIBRARY; python3 verify.py --plugin LIBRARY\n\n"
    )
    return (
        f"Device package of mla-deploy {__version__} for {planned.target.name}: TensorRT "
        f"{planned.release}, SM {', '.join(planned.sms)}.\n"
        "Nothing in it has run on such a device yet.\n\n"
        "  ./build.sh          build both engines with the command line tool, or\n"
        "  python3 build.py    build them with TensorRT's Python package\n"
        "  python3 verify.py   verify them and write report.json\n\n"
        f"{build_plugin if plugin.called else ''}"
        "Needed: TensorRT, its Python package, numpy, Python 3.8 or newer. No torch.\n"
        "Send report.json back: mla-deploy validate BUNDLE --device-report report.json\n"
    )


@contextlib.contextmanager
def bundle_source(
    source: str | os.PathLike[str] | Checkpoint | None, bundle: Bundle
) -> Iterator[Checkpoint | None]:
    """The open checkpoint that `bundle` was made from, or None. Raises: CKPT-*, VAL-SOURCE."""
    if source is None or isinstance(source, Checkpoint):
        yield source
        return
    with open_checkpoint(os.fspath(source)) as checkpoint:
        wanted = bundle.manifest["source"]["checkpoint_digest"]
        if checkpoint.digest != wanted:
            raise IntegrityError(
                "VAL-SOURCE",
                f"the bundle was made from checkpoint {wanted}, this one is {checkpoint.digest}",
                hint="name the checkpoint that the bundle was exported from",
            )
        yield checkpoint
