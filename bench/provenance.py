"""Where a figure comes from: machine, load, versions, and the settings of the run."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

_LIBRARIES = ("mla-deploy", "torch", "transformers", "onnx", "onnx-ir", "numpy")


def provenance(threads: int, **settings: Any) -> dict[str, Any]:
    """What a figure needs beside it: machine, load, versions, and the settings of this run."""
    import onnxruntime

    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {
        "machine": {"processor": _processor(), "cores": len(os.sched_getaffinity(0)),
                    "system": f"{platform.system()} {platform.release()}",
                    "load_average": [round(load, 2) for load in os.getloadavg()]},
        "versions": {"python": platform.python_version(), **versions,
                     "onnxruntime": onnxruntime.__version__},
        "settings": {"threads": threads, **settings},
    }  # fmt: skip


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
