"""Is the engine what the graph was written for? Numbers with limits, from the build's own report.

The builder says nothing when a fusion is missed or a cache is copied; its list of kernels and its
memory figures do. Limits are those of a sound engine: no attention operator without its fused
kernel; each cache copied once a layer (TensorRT-RTX transposes it, the plugin does not); the latent
and the up-projections repeated nowhere (prefill may pad W_uk and W_uv once a call); activations
within a quarter of the prediction; host memory within 3x the weights + 1 GiB, and 2x the weights
more for each further profile.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from mla_deploy.bundle import Bundle
from mla_deploy.engine.estimate import Estimate, host_limit
from mla_deploy.engine.report import BuildReport, GraphReport, ProfileReport

_MIB = 1 << 20
_TILE = 16  # a fused kernel's heads are padded to a multiple
# Kernels that only move data: every word of the name is a kind of movement.
_MOVEMENT = re.compile(r"^__myl_(?:Resh|Tran|Move|Repl|Conc|Slic|Copy|Cast)+_myl")
_FUSED = re.compile(r"_ge(?:mm|mv)_mha|fmha|mha_v\d", re.IGNORECASE)
_SLACK = 1.25


@dataclass(frozen=True)
class AuditLine:
    """One number and the most it may be. `profile` is "" where the whole engine is meant."""

    rule: str
    graph: str
    profile: str
    value: int
    limit: int
    told: str

    @property
    def passed(self) -> bool:
        """At the limit is passed."""
        return self.value <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """The fields and `passed`."""
        return {**asdict(self), "passed": self.passed}


def audit(
    report: BuildReport,
    bundle: Bundle,
    predicted: Estimate,
    limits: Mapping[str, int] | None = None,
) -> tuple[AuditLine, ...]:
    """Every rule on every engine.

    `limits` replaces limits: `{"decode.activation_bytes": 20_000_000}`, or without the graph.
    """
    lines = [line for graph in report.graphs for line in _graph_lines(graph, bundle, predicted)]
    return tuple(_limited(line, limits or {}) for line in lines)


def _limited(line: AuditLine, limits: Mapping[str, int]) -> AuditLine:
    limit = limits.get(f"{line.graph}.{line.rule}", limits.get(line.rule, line.limit))
    return AuditLine(line.rule, line.graph, line.profile, line.value, limit, line.told)


def _graph_lines(graph: GraphReport, bundle: Bundle, predicted: Estimate) -> Iterator[AuditLine]:
    weights, count = predicted.weights_bytes, max(len(graph.profiles), 1)
    yield AuditLine(
        "peak_host_bytes", graph.graph, "", graph.peak_host_bytes, host_limit(weights, count),
        "host memory of the build",
    )  # fmt: skip
    yield AuditLine(
        "plan_bytes", graph.graph, "", graph.plan_bytes,
        count * (weights * 11 // 10 + 16 * _MIB),
        "the weights once a profile",
    )  # fmt: skip
    for profile in graph.profiles:
        yield from _profile_lines(graph, profile, bundle, predicted)


def _profile_lines(
    graph: GraphReport, profile: ProfileReport, bundle: Bundle, predicted: Estimate
) -> Iterator[AuditLine]:
    if profile.activation_bytes is not None:
        wanted = predicted.activation_bytes[profile.profile]
        yield AuditLine(
            "activation_bytes", graph.graph, profile.profile, profile.activation_bytes,
            int(wanted * _SLACK) + 4 * _MIB, f"{wanted:,} predicted",
        )  # fmt: skip
    for rule, value, limit, told in _kernel_counts(graph, profile, bundle):
        yield AuditLine(rule, graph.graph, profile.profile, value, limit, told)


def _kernel_counts(
    graph: GraphReport, profile: ProfileReport, bundle: Bundle
) -> Iterator[tuple[str, int, int, str]]:
    """(rule, value, limit, what it is) of what the list of kernels shows."""
    model, cache = bundle.manifest["model"], bundle.manifest["cache"]
    layers, heads = int(model["num_layers"]), int(model["num_heads"])
    # Of each tensor: a latent of static codes lies apart from its rope key.
    held = {(int(cache["capacity"]), int(t["elements"])) for t in cache["tensors"]}
    rows, width, latent = (
        int(cache["capacity"]), int(cache["row_width"]), int(model["kv_lora_rank"])
    )  # fmt: skip
    operators = graph.layers.get("ATTENTION_INPUT", 0)
    fused = sum(1 for kernel in profile.kernels if _FUSED.search(kernel.name))
    yield (
        "attention_unfused", max(operators - fused, 0), 0,
        f"of {operators} attention operators",
    )  # fmt: skip
    moving = [kernel for kernel in profile.kernels if _MOVEMENT.match(kernel.name)]
    reading = [k for k in moving if any(dims[-2:] in held for dims in k.inputs)]
    least = min(rows * width for rows, width in held)
    # Static codes are scattered into a second buffer.
    most = layers if len(held) == 1 else layers * (1 + len(held))
    yield (
        "cache_copies", sum(1 for k in reading if _largest(k.outputs) >= least), most,
        "kernels that copy a whole cache",
    )  # fmt: skip
    nope, value = int(model["qk_nope_head_dim"]), int(model["v_head_dim"])
    # Keys and values of every head are what prefill makes of the cache, in whole tiles.
    tiles = -(-max(nope + width - latent, value) // _TILE) if graph.graph == "prefill" else 0
    per_head = heads * rows * max(latent, tiles * _TILE + 1 if tiles else 0)
    yield (
        "latent_replicated",
        sum(1 for k in reading if _largest(k.outputs) >= per_head and heads > 1), 0,
        "kernels: the latent per head",
    )  # fmt: skip
    narrow = min(nope, value)
    lifted = [k for k in moving if _largest(k.constants) >= heads * latent * narrow]
    yield (
        "weights_replicated",
        sum(1 for k in lifted if "Repl" in k.name and min(map(min, k.outputs), default=0) < 0), 0,
        "kernels: W_uk, W_uv per row",
    )  # fmt: skip
    yield (
        "weights_copied", sum(1 for k in lifted if not k.inputs),
        0 if graph.graph == "decode" else 2 * layers,
        "kernels: W_uk, W_uv laid out anew in each call",
    )  # fmt: skip


def _largest(dims: Iterable[tuple[int, ...]]) -> int:
    return max((_elements(sizes) for sizes in dims), default=0)


def _elements(dims: tuple[int, ...]) -> int:
    """At least so many: a dynamic size counts as one."""
    return prod(max(size, 1) for size in dims) if dims else 0
