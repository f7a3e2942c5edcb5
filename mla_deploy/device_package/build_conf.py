"""build.conf of a device package: what build.sh gives trtexec, by release.

10.x types a graph weakly unless told; 11 knows strong types only. A plugin takes a function's place
from 10.16 on; before that it needs a graph without the function. The tool of TensorRT-RTX takes the
flags of trtexec that are named here.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from mla_deploy.engine.profiles import Shapes
from mla_deploy.rewrite.release import Release

_ENDS = ("minShapes", "optShapes", "maxShapes")


def build_conf(
    release: Release,
    profiles: Mapping[str, Sequence[Shapes]],
    *,
    weight_streaming: bool,
    has_plugin: bool,
    weights: Sequence[str] = (),
) -> bytes:
    """Assignments that bash reads. `weights` are the bundle's weight files."""
    override = has_plugin and release.has_plugin_override
    lines = [
        "# What build.sh gives the tool; written by mla-deploy.",
        f"RELEASE={shlex.quote(release.name)}",
        f"TOOL={tool(release)}",
        f"HAS_PLUGIN={'yes' if has_plugin else 'no'}",
        _array("WEIGHTS", weights),
        _array("COMMON_FLAGS", common_flags(release, weight_streaming=weight_streaming)),
        _array("PLUGIN_FLAGS", ("--enablePluginOverride",) if override else ()),
        *(_array(f"{graph.upper()}_FLAGS", profile_flags(found))
          for graph, found in profiles.items()),
    ]  # fmt: skip
    return ("\n".join(lines) + "\n").encode("ascii")


def tool(release: Release) -> str:
    """The command line tool of a release."""
    return "tensorrt_rtx" if release.name.startswith("rtx-") else "trtexec"


def common_flags(release: Release, *, weight_streaming: bool) -> tuple[str, ...]:
    """Flags of both graphs."""
    flags = ["--skipInference", "--profilingVerbosity=detailed"]
    if release.name.startswith("10."):
        flags.append("--stronglyTyped")
    if not release.name.startswith("rtx-"):
        flags.append("--maxAuxStreams=0")
    if weight_streaming:
        flags.append("--allowWeightStreaming")
    return tuple(flags)


def profile_flags(profiles: Sequence[Shapes]) -> tuple[str, ...]:
    """`--profile=N --minShapes=... --optShapes=... --maxShapes=...` for each profile."""
    flags = []
    for index, shapes in enumerate(profiles):
        flags.append(f"--profile={index}")
        for place, word in enumerate(_ENDS):
            sizes = ",".join(
                f"{name}:{'x'.join(map(str, ends[place]))}" for name, ends in shapes.items()
            )
            flags.append(f"--{word}={sizes}")
    return tuple(flags)


def _array(name: str, flags: Sequence[str]) -> str:
    return f"{name}=({' '.join(map(shlex.quote, flags))})"
