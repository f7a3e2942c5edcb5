"""What ran where: each part of a validation, on which runtime, or only built, or only read."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mla_deploy.bundle import Bundle
from mla_deploy.machine import processor_name, usable_cores
from mla_deploy.runtime.sessions import Graph, GraphSessions

State = Literal["ran", "built", "only read"]
_GRAPHS: tuple[Graph, ...] = ("prefill", "decode")


@dataclass(frozen=True)
class Part:
    """One part: `where` is a runtime with its version, `told` what that means."""

    part: str
    state: State
    where: str
    told: str = ""


@dataclass(frozen=True)
class Placement:
    """The machine, and what of the bundle was run on it."""

    processor: str
    cores: int
    system: str
    parts: tuple[Part, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "parts": [asdict(part) for part in self.parts]}


def placement_of(
    bundle: Bundle, sessions: GraphSessions, source: Mapping[str, str] | None
) -> Placement:
    """`source`: library versions of a PyTorch source that ran, or None when none did."""
    return Placement(
        processor=processor_name(),
        cores=usable_cores(),
        system=f"{platform.system()} {platform.release()}",
        parts=tuple(_parts(bundle, sessions, source)),
    )


def _parts(
    bundle: Bundle, sessions: GraphSessions, source: Mapping[str, str] | None
) -> Iterator[Part]:
    if source is not None:
        libraries = [f"{name} {source[name]}" for name in ("torch", "transformers")
                     if name in source]  # fmt: skip
        yield Part("source", "ran", f"{', '.join(libraries)}, CPU", "the reference of every case")
    for graph in _GRAPHS:
        yield _graph(bundle, sessions, graph)
    yield from _engines(bundle)


def _graph(bundle: Bundle, sessions: GraphSessions, graph: Graph) -> Part:
    if graph not in sessions.opened():
        return Part(f"{graph} graph", "only read", "-", "no case took it")
    told = "as the bundle holds it"
    if "engine" in bundle.manifest:
        told = f"a stand-in for {bundle.manifest['target']}: its nodes, on the CPU"
    return Part(f"{graph} graph", "ran", sessions.runtime(graph), told)


def _engines(bundle: Bundle) -> Iterator[Part]:
    if bundle.engine is not None:
        runtime = bundle.engine.facts["runtime"]
        sms = ", ".join(bundle.engine.sms)
        yield Part(
            "engines", "built", f"{runtime['package']} {runtime['version']}, SM {sms}",
            "not run here; `validate --engine` asks them",
        )  # fmt: skip
    elif "engine" in bundle.manifest:
        release = bundle.manifest["engine"]["release"]
        yield Part("engines", "only read", f"TensorRT line {release}", "lowered; none was built")
