"""What a build will take, before it starts: host memory, disk, and activations on the device.

Upper figures. Host memory and plans were measured with TensorRT-RTX 1.7: a builder holds the
weights, then for each profile the weights as its kernels want them and the plan made of those.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mla_deploy.bundle import Bundle
from mla_deploy.engine.profiles import BuildProfile, Graph
from mla_deploy.errors import EnvironmentFailure, quoted
from mla_deploy.machine import available_bytes

_GIB = 1 << 30
_BASE_BYTES = _GIB  # libraries, the graph, the log
_PLAN_BASE_BYTES = 8 << 20  # kernels of a profile
_SCRATCH_BYTES = 8_192_000  # what every TensorRT-RTX engine with a matrix product reserves
_FP32 = 4


@dataclass(frozen=True)
class Estimate:
    """Bytes. `activation_bytes` is by profile, keyed by the profile's text."""

    weights_bytes: int
    host_bytes: int
    plan_bytes: int
    activation_bytes: Mapping[str, int]


def estimate(bundle: Bundle, profiles: Mapping[Graph, tuple[BuildProfile, ...]]) -> Estimate:
    """Both graphs are built one after the other: host memory is that of the larger build."""
    weights = int(bundle.manifest["weights"]["bytes"]) + bundle.kept_bytes
    most = max(len(found) for found in profiles.values())
    plans = sum(len(found) * (weights + _PLAN_BASE_BYTES) for found in profiles.values())
    activation = {
        str(profile): activation_bytes(bundle, profile)
        for found in profiles.values()
        for profile in found
    }
    return Estimate(weights, host_limit(weights, most), plans, activation)


def host_limit(weights_bytes: int, profiles: int) -> int:
    """3x the weights plus 1 GiB for one profile, twice the weights more for each further one."""
    return (1 + 2 * profiles) * weights_bytes + _BASE_BYTES


def activation_bytes(bundle: Bundle, profile: BuildProfile) -> int:
    """Bytes that a profile's largest call needs beside weights and caches.

    Decode, absorbed: the cache once transposed and once as it lies, and the scores. Prefill,
    expanded: keys and (padded) values of the whole capacity, and the product they are cut from.
    """
    model, cache, config = bundle.manifest["model"], bundle.manifest["cache"], bundle.config
    item, rows = int(cache["itemsize"]), int(cache["capacity"])
    batch = profile.axes["batch"].max if "batch" in profile.axes else 1
    tokens = profile.axes["new_tokens"].max if "new_tokens" in profile.axes else 1
    heads, width = int(model["num_heads"]), int(cache["row_width"])
    nope, rope, value = (
        int(model[name]) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    scores = batch * heads * tokens * rows * (_FP32 + item)
    if profile.graph == "decode":
        attention = 2 * batch * rows * width * item + scores
    else:
        fused = "Attention" in str(bundle.manifest.get("engine", {}).get("attention", "Attention"))
        expanded = batch * rows * heads * (2 * (nope + rope) + nope + value) * item
        attention = expanded + (0 if fused else scores)
    hidden = batch * tokens * (4 * config.hidden_size + 2 * config.intermediate_size) * item
    logits = batch * int(model["vocab_size"]) * (_FP32 + item)
    return _SCRATCH_BYTES + attention + max(hidden, logits)


def require_disk(folder: Path, needed_bytes: int) -> None:
    """Raises: EnvironmentFailure BLD-DISK when the plans would not fit where they are written."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise EnvironmentFailure(
            "BLD-DISK",
            f"the plans take up to {needed_bytes / _GIB:.1f} GiB, {free / _GIB:.1f} GiB are free "
            f"in {quoted(folder)}",
            hint="free some space, or copy the bundle to a larger disk; nothing was written",
            found=free,
            wanted=needed_bytes,
        )


def require_room(needed_bytes: int) -> None:
    """Raises: EnvironmentFailure BLD-MEMORY when a build of that size would not fit in memory."""
    free = available_bytes()
    if free is not None and free < needed_bytes:
        raise EnvironmentFailure(
            "BLD-MEMORY",
            f"the build takes up to {needed_bytes / _GIB:.1f} GiB of host memory, "
            f"{free / _GIB:.1f} GiB are available",
            hint="close other programs, build fewer profiles at once, or build on a machine with "
            "more memory; swap counts only if it is fast",
            found=free,
            wanted=needed_bytes,
        )
