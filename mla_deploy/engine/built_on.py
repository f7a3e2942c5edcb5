"""What engine.json says of the GPU and the plugin that engines were built with.

A plan runs nowhere else: the runner compares this with where it is before it loads one.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from mla_deploy.device.cuda import Cuda
from mla_deploy.device.failure import DeviceFailure
from mla_deploy.door import open_folder

_MAX_LIBRARY_BYTES = 1 << 30
_KEPT = ("name", "sm", "multiprocessors", "cuda_runtime", "cuda_driver")


def built_on(package: str) -> dict[str, Any] | None:
    """The GPU of this machine, for `tensorrt`, which builds for it; None with TensorRT-RTX."""
    if package != "tensorrt":
        return None
    try:
        facts = Cuda().facts()
    except DeviceFailure:
        return None
    return {name: facts[name] for name in _KEPT}


def library_digest(path: str | None) -> str | None:
    """The sha256 of a plugin library; None for None. Raises: FILE-*."""
    if path is None:
        return None
    where = Path(path)
    with open_folder(where.parent) as folder:
        data = folder.read_bytes(where.name, "checkpoint", max_bytes=_MAX_LIBRARY_BYTES)
    return hashlib.sha256(data).hexdigest()
