"""What engine.json says of the GPU that engines were built with.

A plan runs nowhere else: the runner compares this with where it is before it loads one.
"""

from __future__ import annotations

from typing import Any

from mla_deploy.device.cuda import Cuda
from mla_deploy.device.failure import DeviceFailure

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
