"""What the worker is asked to build: one graph, as JSON on its standard input."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mla_deploy.engine.profiles import Shapes

PACKAGES = ("tensorrt_rtx", "tensorrt")


@dataclass(frozen=True)
class BuildRequest:
    """`onnx` is parsed where it stands (its weight files beside it), `plan` must not exist.

    `release` ("10.16", "rtx-1.7") is the line whose graphs these are. `sms` ("8.9") is what
    TensorRT-RTX compiles for; `tensorrt` builds for the GPU it runs on.
    """

    package: str
    release: str
    onnx: str
    plan: str
    sms: tuple[str, ...]
    profiles: tuple[Shapes, ...]
    weight_streaming: bool = False
    plugin_library: str | None = None

    def to_json(self) -> bytes:
        """One line."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, text: bytes) -> BuildRequest:
        """The inverse of `to_json`; the text comes from our own parent process."""
        value: dict[str, Any] = json.loads(text)
        value["sms"] = tuple(value["sms"])
        value["profiles"] = tuple(_shapes(profile) for profile in value["profiles"])
        return cls(**value)


def _shapes(profile: Mapping[str, Sequence[Sequence[int]]]) -> Shapes:
    return {
        name: (tuple(low), tuple(best), tuple(high)) for name, (low, best, high) in profile.items()
    }
