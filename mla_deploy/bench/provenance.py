"""Where a figure comes from: machine, load, versions, and the settings of the run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

from mla_deploy.machine import processor_name, usable_cores

_LIBRARIES = ("mla-deploy", "torch", "transformers", "onnx", "onnx-ir", "numpy")
_RUNTIMES = ("onnxruntime-gpu", "onnxruntime")  # one package, two wheels


def provenance(threads: int | None, **settings: Any) -> dict[str, Any]:
    """What a figure needs beside it: machine, load, versions, and the settings of this run."""
    versions = {name: version_of(name) for name in _LIBRARIES}
    runtime = next((v for v in map(version_of, _RUNTIMES) if v is not None), None)
    return {
        "machine": {"processor": processor_name(), "cores": usable_cores(),
                    "system": f"{platform.system()} {platform.release()}",
                    "load_average": [round(load, 2) for load in os.getloadavg()]},
        "versions": {"python": platform.python_version(), **versions, "onnxruntime": runtime},
        "settings": {"threads": threads, **settings},
    }  # fmt: skip


def version_of(distribution: str) -> str | None:
    """The version of an installed distribution; None where there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
