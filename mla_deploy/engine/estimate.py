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
from mla_deploy.config import MlaConfig
from mla_deploy.engine.profiles import BuildProfile, Graph
from mla_deploy.errors import EnvironmentFailure, quoted
from mla_deploy.machine import available_bytes
from mla_deploy.rewrite.releases import find_release

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


@dataclass(frozen=True)
class Call:
    """The largest call of a profile: `batch` rows of `tokens` new tokens, `capacity` cached ones.

    `row_width` values of `itemsize` bytes are cached for a token, `code_width` of them as codes.
    """

    graph: Graph
    batch: int
    tokens: int
    capacity: int
    row_width: int
    itemsize: int
    release: str
    all_logits: bool = False
    code_width: int = 0


def activation_bytes(bundle: Bundle, profile: BuildProfile) -> int:
    """Bytes that a profile's largest call needs beside weights and caches."""
    cache = bundle.manifest["cache"]
    call = Call(
        profile.graph,
        batch=profile.axes["batch"].max if "batch" in profile.axes else 1,
        tokens=profile.axes["new_tokens"].max if "new_tokens" in profile.axes else 1,
        capacity=int(cache["capacity"]),
        row_width=int(cache["row_width"]),
        itemsize=int(cache["itemsize"]),
        release=str(bundle.manifest["engine"]["release"]),
        all_logits=bool(bundle.manifest["all_logits"]),
        code_width=sum(
            int(t["elements"]) for t in cache["tensors"][:1] if t.get("scales") is not None
        ),
    )
    return call_bytes(bundle.config, call)


def call_bytes(config: MlaConfig, call: Call) -> int:
    """Bytes that `call` needs beside weights and caches.

    Attention, an indexer and the rest of a block do not stand at the same time, so the largest
    counts. All but indexers was checked against TensorRT-RTX 1.7 with one stream
    (`tests/engine/test_estimate.py`).
    """
    attend = _absorbed_bytes if call.graph == "decode" else _expanded_bytes
    judged = call.batch * call.tokens if call.all_logits else call.batch
    logits = judged * config.vocab_size * (_FP32 + call.itemsize)
    block = _block_bytes(config, call.graph, call.batch * call.tokens, call.itemsize)
    largest = max(attend(config, call), block, _indexer_bytes(config, call))
    return _SCRATCH_BYTES + largest + logits


def _absorbed_bytes(config: MlaConfig, call: Call) -> int:
    """The cache once more, transposed and not as codes, codes as they are beside it; the scores in
    both types."""
    cached = call.batch * call.capacity
    scores = cached * config.num_heads * call.tokens * (_FP32 + call.itemsize)
    return cached * (call.row_width * call.itemsize + call.code_width) + scores


def _expanded_bytes(config: MlaConfig, call: Call) -> int:
    """Keys and values of the whole capacity, the values padded to the keys' width, and the product
    they are cut from; the mask, the queries and the result. The scores stand only where the release
    has no fused operator."""
    item, rows = call.itemsize, call.capacity
    head = config.qk_nope_head_dim + config.qk_rope_head_dim
    product = config.qk_nope_head_dim + config.v_head_dim
    cached = call.batch * rows * config.num_heads * (2 * head + product) * item
    release = find_release(call.release)
    fused = any(name.endswith("Attention") for name in release.operators)
    scores = 0 if fused else call.batch * config.num_heads * call.tokens * rows * (_FP32 + item)
    mask = call.batch * call.tokens * rows * item
    return cached + scores + mask + 2 * call.batch * call.tokens * config.num_heads * head * item


def _indexer_bytes(config: MlaConfig, call: Call) -> int:
    """The scores that a sparse layer chooses by, of each of its heads, in both types."""
    heads = int(config.raw.get("index_n_heads") or 0)
    return call.batch * heads * call.tokens * call.capacity * (_FP32 + call.itemsize)


def _block_bytes(config: MlaConfig, graph: Graph, tokens: int, item: int) -> int:
    """What stands beside attention: a block's own rows and the experts.

    Decode gathers the weights of each token's experts; prefill runs every expert on every token.
    """
    width, inner = config.hidden_size, _inner_width(config)
    chosen, experts = config.experts_per_token, config.num_experts
    expert = int(config.raw.get("moe_intermediate_size") or 0)
    rows = tokens * (4 * width + 3 * inner) * item
    if graph == "decode":
        moe = tokens * chosen * 3 * width * expert * item
    else:
        moe = tokens * experts * (width + 3 * expert) * item
    return rows + moe


def _inner_width(config: MlaConfig) -> int:
    """The inner width of a dense block, or of the shared experts."""
    dense, expert, shared = (
        int(config.raw.get(name) or 0)
        for name in ("intermediate_size", "moe_intermediate_size", "n_shared_experts")
    )
    return max(dense, expert * shared)


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
