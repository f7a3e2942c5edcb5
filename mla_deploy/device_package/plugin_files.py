"""The plugin in a device package: its source, and machine code compiled here where that can be."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from mla_deploy.bundle import Bundle
from mla_deploy.device_package.stage import PackageStage
from mla_deploy.door import open_folder
from mla_deploy.engine.plugin_graph import without_body
from mla_deploy.errors import EnvironmentFailure, quoted
from mla_deploy.rewrite.release import Release

OPERATOR = "MlaDecode"
# Inside the package where it is installed, beside it in a checkout.
_PLUGINS = next(
    (place for place in (Path(__file__).parents[1] / "plugins",) if place.is_dir()),
    Path(__file__).parents[2] / "plugins",
)
_COMPILER = "plugins.mla_decode.aot"
_DTYPES = {ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
_SECONDS = 1200
_BARE = "plugin/decode.onnx"
_MOST_BYTES = 1 << 20  # of a source file
_SKIPPED = ("__pycache__", ".pyc", ".so", ".o")


@dataclass(frozen=True)
class PluginFiles:
    """What was put in. `called`: whether the graphs call the operator.

    `told` says in a sentence what is there and what is not. `graphs` are those without the
    operator's function, for releases that cannot put a plugin in its place, and `weights` what they
    need beside them.
    """

    called: bool
    source: bool
    kernels: tuple[str, ...]
    told: str
    graphs: Mapping[str, str] = field(default_factory=dict)
    weights: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For package.json."""
        return {"called": self.called, "source": self.source, "kernels": list(self.kernels),
                "told": self.told, "graphs": dict(self.graphs),
                "weights": list(self.weights)}  # fmt: skip


def source_digest() -> str:
    """SHA-256 of what MlaDecode's kernels are compiled from: what a report of a device is of."""
    digest = hashlib.sha256()
    with open_folder(_PLUGINS / "mla_decode") as plugin, plugin.folder("src") as source:
        compiled = [(source, name) for name in source.names() if "check" not in name]
        for folder, name in (*compiled, (plugin, "triton_kernels.py")):
            digest.update(name.encode() + b"\0" + folder.read_bytes(name, max_bytes=_MOST_BYTES))
    return digest.hexdigest()


def add_plugin(stage: PackageStage, bundle: Bundle, sm: str, release: Release) -> PluginFiles:
    """Copy the source into `plugin/`; compile the kernels where the graphs call the operator, and
    write the decode graph that only the plugin runs where the release needs one.

    Raises: EnvironmentFailure PKG-KERNELS (the compiler is there and failed).
    """
    variant = called_variant(bundle)
    called = variant is not None
    if called and not release.has_plugin_override:
        stage.write(_BARE, without_body(bundle.graph("decode")))
        found = _files(stage, variant, sm)
        return replace(found, graphs={"decode": _BARE}, weights=bundle.weight_files)
    return _files(stage, variant, sm)


def _files(stage: PackageStage, variant: Mapping[str, Any] | None, sm: str) -> PluginFiles:
    """Source and kernels."""
    called = variant is not None
    source = _PLUGINS / "mla_decode"
    if not source.is_dir():
        return PluginFiles(False, False, (), "no plugin: this installation has no source of it")
    for path in sorted(source.rglob("*")):
        if path.is_file() and not any(mark in str(path) for mark in _SKIPPED):
            name = path.relative_to(source).as_posix()
            stage.copy(f"plugin/mla_decode/{name}", path.parent, path.name)
    if variant is None:
        return PluginFiles(called, True, (), f"source only: the graphs call no {OPERATOR}")
    if importlib.util.find_spec("triton") is None:
        return PluginFiles(called, True, (), "source only: triton is not installed here")
    if not _is_compiled_for(variant):
        told = "source only: the kernels are compiled for fp16 and bf16 and widths of powers of two"
        return PluginFiles(called, True, (), told)
    kernels = _compiled(stage, variant, sm)
    return PluginFiles(called, True, kernels, f"source, and kernels compiled for SM {sm}")


def called_variant(bundle: Bundle) -> Mapping[str, Any] | None:
    """What the decode graph's first MlaDecode is: its attributes, `rope` and `dtype`, by its cache.

    None when it calls none.
    """
    model = ir.load(bundle.graph("decode"))
    graphs = (model.graph, *(function.graph for function in model.functions.values()))
    for graph in graphs:
        for node in ir.traversal.RecursiveGraphIterator(graph):
            if node.op_type == OPERATOR:
                found = {name: value.value for name, value in node.attributes.items()}
                return {**found, **_of_cache(node, int(found["latent"]))}
    return None


def _of_cache(node: ir.Node, latent: int) -> dict[str, Any]:
    cache = node.inputs[2] if len(node.inputs) > 2 else None
    if cache is None or cache.shape is None or cache.dtype not in _DTYPES:
        return {}
    width = cache.shape[-1]
    rope = {"rope": width - latent} if isinstance(width, int) else {}
    return {**rope, "dtype": _DTYPES[cache.dtype]}


def _is_compiled_for(variant: Mapping[str, Any]) -> bool:
    """Whether Triton's kernels take these sizes: see plugins/mla_decode/README.md."""
    widths = [int(variant.get(name) or 0) for name in ("latent", "rope", "tile", "rope_tile")]
    return {"rope", "dtype"} <= set(variant) and all(width & (width - 1) == 0 for width in widths)


def _compiled(stage: PackageStage, variant: Mapping[str, Any], sm: str) -> tuple[str, ...]:
    named = ("scale", "latent", "rope", "storage", "tile", "rope_tile", "dtype")
    flags = [f"--{name.replace('_', '-')}={variant[name]}" for name in named if name in variant]
    environment = {**os.environ, "PYTHONPATH": str(_PLUGINS.parent)}
    with tempfile.TemporaryDirectory(prefix="mla-deploy-") as out:
        done = subprocess.run(
            [sys.executable, "-m", _COMPILER, "--out", out, "--sm", sm.replace(".", ""), *flags],
            env=environment, capture_output=True, text=True, timeout=_SECONDS, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise EnvironmentFailure(
                "PKG-KERNELS",
                f"the plugin's kernels were not compiled: {quoted(done.stderr.strip()[-150:])}",
                hint="--plugin off leaves the plugin out",
            )
        names = tuple(sorted(os.listdir(out)))
        for name in names:
            stage.copy(f"plugin/kernels/{name}", Path(out), name)
    return names
