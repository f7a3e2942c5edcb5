"""Builds both engines of a device package on its device, with TensorRT's Python package alone.

`build.sh` does the same with trtexec; use what the device has.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from .failure import DeviceFailure
from .files import BARE, BUILT, ENGINES, HERE, Package, read_bytes, write_whole
from .library import Library

if TYPE_CHECKING:
    from collections.abc import Sequence

_MIB = 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status; a refusal is one line on stderr."""
    parser = argparse.ArgumentParser(prog="build.py", description="Build both engines here.")
    parser.add_argument("--package", default=HERE, help="the package's folder  [this one]")
    parser.add_argument("--workspace", type=int, metavar="MIB", help="most scratch memory, in MiB")
    parser.add_argument("--plugin", metavar="LIBRARY", help="MlaDecode's library, built here")
    given = parser.parse_args(arguments)
    try:
        for line in build(Package(given.package), given.workspace, given.plugin):
            print(line, flush=True)
    except DeviceFailure as failure:
        print(f"build.py: {failure.message}", file=sys.stderr)
        return failure.exit_status
    return 0


def build(package: Package, workspace_mib: int | None, plugin: str | None) -> Any:
    """Lines to print; the plans and engines/build.json. Raises: DeviceFailure."""
    facts = package.facts
    library = Library(facts["package"])
    library.require_release(facts["release"])
    if plugin is not None:
        if not facts["plugin"]["called"]:
            raise DeviceFailure("incompatible", "these graphs call no plugin")
        library.load_plugin(os.path.abspath(plugin))
    os.makedirs(package.path(ENGINES), exist_ok=True)
    plans = {}
    for graph in ("prefill", "decode"):
        started = time.perf_counter()
        network, config, parser = _prepared(library, package, graph, plugin is not None)
        if workspace_mib is not None:
            config.set_memory_pool_limit(library.trt.MemoryPoolType.WORKSPACE, workspace_mib * _MIB)
        plan = library.builder.build_serialized_network(network, config)
        del parser  # it owns the weights until the plan is made
        if plan is None:
            raise DeviceFailure("incompatible", f"{graph} cannot be built{library.reason()}")
        data = memoryview(plan)  # not copied: it holds the weights
        write_whole(package.path(ENGINES, f"{graph}.plan"), data)
        seconds = round(time.perf_counter() - started, 3)
        plans[graph] = {"bytes": data.nbytes, "sha256": hashlib.sha256(data).hexdigest(),
                        "seconds": seconds}  # fmt: skip
        yield f"{graph}.plan: {data.nbytes:,} bytes in {seconds:.1f} s"
    note = {"by": "build.py", "package": library.package, "version": library.version,
            "package_digest": package.digest, "plugin": plugin is not None,
            "plans": plans}  # fmt: skip
    write_whole(package.path(ENGINES, BUILT), json.dumps(note, indent=2).encode() + b"\n")


def graph_path(package: Package, graph: str, plugin: bool) -> str:
    """The graph to build. Where a plugin needs one without its function, that one, in a folder of
    links to the weights: a parser looks for them beside the graph and nowhere above it."""
    bare = package.facts["plugin"].get("graphs", {}).get(graph) if plugin else None
    if bare is None:
        return package.path(f"bundle/{graph}.onnx")
    place = package.path(ENGINES, BARE)
    os.makedirs(place, exist_ok=True)
    for name in package.facts["plugin"]["weights"]:
        link = os.path.join(place, name)
        if not os.path.lexists(link):
            os.symlink(os.path.join("..", "..", "bundle", name), link)
    path = os.path.join(place, f"{graph}.onnx")
    write_whole(path, read_bytes(package.path(bare)))
    return path


def _prepared(library: Library, package: Package, graph: str, plugin: bool) -> Any:
    """(network, config, parser) of one graph, with its profiles."""
    trt = library.trt
    library.builder = trt.Builder(library.logger)
    builder = library.builder
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, library.logger)
    override = getattr(trt.OnnxParserFlag, "ENABLE_PLUGIN_OVERRIDE", None)  # since 10.15
    if plugin and override is not None:
        parser.set_flag(override)
    if not parser.parse_from_file(graph_path(package, graph, plugin)):
        told = parser.get_error(0).desc() if parser.num_errors else "no reason given"
        raise DeviceFailure("incompatible", f"{graph}.onnx is not taken: {told[:300]}")
    config = builder.create_builder_config()
    if library.package == "tensorrt_rtx":
        sms = package.facts["sms"]
        config.num_compute_capabilities = len(sms)
        for index, sm in enumerate(sms):
            wanted = getattr(trt.ComputeCapability, "SM" + sm.replace(".", ""))
            config.set_compute_capability(wanted, index)
    config.max_aux_streams = 0
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if package.facts["weight_streaming"]:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    preview = getattr(trt.PreviewFeature, "ALIASED_PLUGIN_IO_10_03", None)
    if plugin and preview is not None:
        config.set_preview_feature(preview, True)
    for profile in package.facts["profiles"][graph]:
        made = builder.create_optimization_profile()
        for name, ends in profile["shapes"].items():
            made.set_shape(name, tuple(ends["min"]), tuple(ends["opt"]), tuple(ends["max"]))
        if config.add_optimization_profile(made) < 0:
            raise DeviceFailure("incompatible", f"profile {profile['name']} is not taken")
    return network, config, parser


if __name__ == "__main__":
    sys.exit(main())
