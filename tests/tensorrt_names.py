"""What the two stand-ins of `tensorrt` have in common: names, and calls that go to a record."""

from __future__ import annotations

import enum
import json
import os
from pathlib import Path
from typing import Any

__all__ = [
    "BuilderFlag",
    "ILogger",
    "NetworkDefinitionCreationFlag",
    "OnnxParserFlag",
    "PreviewFeature",
    "ProfilingVerbosity",
]


def python_path(stand_in: Path) -> str:
    """$PYTHONPATH of a process that finds the stand-in of that folder, and this project."""
    return os.pathsep.join((str(stand_in), str(Path(__file__).parents[1])))


def record(call: str, *arguments: Any) -> None:
    """As a JSON line in $STAND_IN_RECORD, where there is one."""
    path = os.environ.get("STAND_IN_RECORD")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps([call, *arguments], default=str) + "\n")


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity

    def __init__(self) -> None:
        pass


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class OnnxParserFlag(enum.IntEnum):
    ENABLE_PLUGIN_OVERRIDE = 5


class ProfilingVerbosity(enum.Enum):
    DETAILED = "detailed"


class BuilderFlag(enum.Enum):
    WEIGHT_STREAMING = "weight streaming"


class PreviewFeature(enum.Enum):
    ALIASED_PLUGIN_IO_10_03 = "aliased plugin io"


class RecordedConfig:
    """The part of IBuilderConfig that only takes note."""

    def set_flag(self, flag: BuilderFlag) -> None:
        record("set_flag", flag.name)

    def set_preview_feature(self, feature: PreviewFeature, on: bool) -> None:
        record("set_preview_feature", feature.name, on)


class RecordedParser:
    """The part of OnnxParser that only takes note."""

    def set_flag(self, flag: OnnxParserFlag) -> None:
        record("set_parser_flag", flag.name)
