"""The release lines of TensorRT that graphs are lowered to, by name; `targets.py` points here."""

from __future__ import annotations

from mla_deploy.errors import MlaDeployError
from mla_deploy.rewrite import rtx_1_7, trt_10_3, trt_10_13, trt_10_16, trt_11
from mla_deploy.rewrite.release import Release

RELEASES: dict[str, Release] = {
    module.RELEASE.name: module.RELEASE
    for module in (trt_10_3, trt_10_13, trt_10_16, trt_11, rtx_1_7)
}


def find_release(name: str) -> Release:
    """Raises: MlaDeployError REW-RELEASE when a target names one that is not listed."""
    if name not in RELEASES:
        raise MlaDeployError("REW-RELEASE", f"no release {name}; wanted one of {[*RELEASES]}")
    return RELEASES[name]
