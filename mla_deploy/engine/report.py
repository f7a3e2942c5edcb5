"""What a build was, as numbers: one tree of frozen dataclasses, `to_dict()` for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

Dims = tuple[int, ...]


@dataclass(frozen=True)
class Kernel:
    """One kernel of the finished engine. Dimensions hold -1 where the size is dynamic."""

    name: str
    type: str
    inputs: tuple[Dims, ...] = ()
    constants: tuple[Dims, ...] = ()
    outputs: tuple[Dims, ...] = ()


@dataclass(frozen=True)
class NodeError:
    """One refusal of TensorRT. `message` is ours where we know the error, `told` is its own text
    without the tail about CUDA, `stack` the calls of model-local functions that lead to `node`."""

    message: str
    fix: str
    told: str
    code: str = ""
    node: str = ""
    operator: str = ""
    stack: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """`outer > inner (Operator)`, or "" for an error of no node."""
        path = " > ".join((*self.stack, self.node) if self.node else self.stack)
        return f"{path} ({self.operator})" if self.operator else path


@dataclass(frozen=True)
class ProfileReport:
    """One profile of one engine: what the builder says its activations take, and its kernels."""

    profile: str
    activation_bytes: int | None
    kernels: tuple[Kernel, ...]


@dataclass(frozen=True)
class GraphReport:
    """One engine. `peak_host_bytes` is the high water mark of the building process."""

    graph: str
    parse_seconds: float
    build_seconds: float
    weights_bytes: int | None
    plan_bytes: int
    peak_host_bytes: int
    layers: Mapping[str, int]
    profiles: tuple[ProfileReport, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class BuildReport:
    """Both engines, and what built them."""

    package: str
    version: str
    release: str
    sms: tuple[str, ...]
    graphs: tuple[GraphReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, texts and numbers."""
        return asdict(self)

    def to_record(self) -> dict[str, Any]:
        """The same for engine.json, each kernel as one text: a large model has 100,000 of them."""
        told = asdict(self)
        for graph in told["graphs"]:
            for profile in graph["profiles"]:
                profile["kernels"] = [f"{k['type']} {k['name']}" for k in profile["kernels"]]
        return told
