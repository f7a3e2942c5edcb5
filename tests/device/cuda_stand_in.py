"""The stand-ins of CUDA and of `tensorrt` made ready: compiled once a run, and an environment."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

STAND_IN = Path(__file__).with_name("stand_in")
ROOT = Path(__file__).parents[2]


@functools.lru_cache(maxsize=1)
def cudart() -> Path:
    """The compiled stand-in, under the name that a program looks for."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler for the stand-in of the CUDA runtime")
    library = Path(_folder.name) / "libcudart.so.13"
    source = STAND_IN / "cudart.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return library


_folder = tempfile.TemporaryDirectory(prefix="mla-deploy-cudart-")


def environment(record: Path | None = None, **more: str) -> dict[str, str]:
    """For a process that finds both stand-ins. The stand-in of `tensorrt` needs this project."""
    library = cudart()
    made = {
        **os.environ, "LD_LIBRARY_PATH": str(library.parent), "STAND_IN_CUDART": str(library),
        "PYTHONPATH": os.pathsep.join((str(STAND_IN), str(ROOT))), **more,
    }  # fmt: skip
    if record is not None:
        made["STAND_IN_RECORD"] = str(record)
    return made
