"""What is verified of a pair of engines: each check one row, passed, failed or not run."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from .contract import Contract, alias_differences, differences
from .failure import DeviceFailure
from .model import DeviceModel
from .numbers import broken_gates

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .golden import Golden

_WARM_STEPS = 5
_PREFILLS = 5


class Checks:
    """Rows of a report: name, status, told, and figures."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    @property
    def passed(self) -> bool:
        """Every row that ran passed, and the numbers ran."""
        ran = any(r["name"].startswith("numbers") and r["status"] == "passed" for r in self.rows)
        return ran and not any(row["status"] == "failed" for row in self.rows)

    def add(self, name: str, passed: bool, told: str, **figures: Any) -> None:
        status = "passed" if passed else "failed"
        self.rows.append({"name": name, "status": status, "told": told, "figures": figures})

    def skip(self, name: str, told: str) -> None:
        self.rows.append({"name": name, "status": "not run", "told": told, "figures": {}})


def engine_checks(checks: Checks, graph: str, engine: Any, contract: Contract) -> None:
    """Inputs, outputs and profiles are the manifest's; caches lie in place."""
    told = differences(contract, graph, engine)
    wanted = len(contract.profiles[graph])
    if engine.num_optimization_profiles != wanted:
        told.append(f"{engine.num_optimization_profiles} profiles, wanted {wanted}")
    checks.add(f"io {graph}", not told, "; ".join(told) or f"{engine.num_io_tensors} tensors")
    aliased = alias_differences(contract, graph, engine)
    if aliased is None and graph in contract.plugin_graphs:
        checks.skip(f"alias {graph}", "TensorRT does not say: the plugin writes where it reads")
    elif aliased is None:
        checks.skip(f"alias {graph}", "it updates no cache in place: each gets two buffers")
    else:
        checks.add(f"alias {graph}", not aliased,
                   "; ".join(aliased) or "caches lie in place")  # fmt: skip


def memory_checks(checks: Checks, profiles: Any, engines: Any) -> None:
    """Activation bytes of each profile against its limit."""
    for graph, rows in profiles.items():
        for index, profile in enumerate(rows):
            found = int(engines[graph].get_device_memory_size_for_profile_v2(index))
            limit = int(profile["activation_limit_bytes"])
            checks.add(f"memory {graph} {index}", found <= limit,
                       f"{found:,} bytes of activations, at most {limit:,}",
                       found=found, limit=limit, profile=profile["name"])  # fmt: skip


def golden_checks(checks: Checks, golden: Golden, gate: Any, parts: Any) -> None:
    """Every golden case through both engines, its numbers against the dtype's gate."""
    cuda, engines, contract = parts
    for case in golden.cases:
        name = f"numbers {case['name']}"
        try:
            model = DeviceModel(cuda, engines, contract, int(case["batch"]))
            try:
                found = golden.run(case, model, gate["rel_l2"])
                memory = model.cache_bytes
            finally:
                model.close()
        except DeviceFailure as failure:
            checks.add(name, False, failure.message)
            continue
        broken = broken_gates(found, gate)
        told = "; ".join(broken) or (
            f"{found['positions']} positions against {golden.origin}: relative L2 "
            f"{found['rel_l2']:.2g}"
        )
        checks.add(name, not broken, told, cache_bytes=memory, in_place=model.in_place,
                   batch=int(case["batch"]), **found)  # fmt: skip


def latency_checks(checks: Checks, parts: Any, steps: int) -> None:
    """Median of decode steps at half the capacity and of prefills, one row; not judged."""
    cuda, engines, contract = parts
    tokens = int(contract.profiles["prefill"][0]["input_ids"]["opt"][1])
    if not (contract.takes("prefill", 1, tokens) and contract.takes("decode", 1, 1)):
        checks.skip("latency", "no profile takes one row")
        return
    try:
        model = DeviceModel(cuda, engines, contract, 1)
        try:
            _latencies(checks, model, tokens, steps)
        finally:
            model.close()
    except DeviceFailure as failure:
        checks.add("latency", False, failure.message)


def _latencies(checks: Checks, model: DeviceModel, tokens: int, steps: int) -> None:
    one, whole = np.ones(1, np.int64), np.full(1, tokens, np.int64)
    ids = np.zeros((1, tokens), np.int64)
    held = np.full(1, min(model.contract.capacity // 2, model.contract.capacity - 1), np.int64)

    def prefill() -> None:
        model.run("prefill", ids, np.zeros(1, np.int64), whole)

    figures = _timed(prefill, 1, _PREFILLS)
    checks.add("latency prefill", True, f"median {figures['median_ms']:.3f} ms", tokens=tokens,
               **figures)  # fmt: skip
    for _ in range(2):  # the second step is recorded
        model.run("decode", np.zeros((1, 1), np.int64), held, one)
    figures = _timed(model.step, _WARM_STEPS, steps)
    recorded = model.is_recorded
    checks.add("latency decode", True,
               f"median {figures['median_ms']:.3f} ms, {'CUDA graph' if recorded else 'plain'}",
               cached_tokens=int(held[0]), cuda_graph=recorded,
               cuda_graph_refused=model.graph_refused, **figures)  # fmt: skip


def _timed(run: Callable[[], None], warm: int, count: int) -> dict[str, Any]:
    for _ in range(warm):
        run()
    found = []
    for _ in range(max(count, 1)):
        started = time.perf_counter()
        run()
        found.append(1000 * (time.perf_counter() - started))
    return {"median_ms": _quantile(found, 0.5), "p10_ms": _quantile(found, 0.1),
            "p90_ms": _quantile(found, 0.9), "count": len(found)}  # fmt: skip


def _quantile(values: Sequence[float], share: float) -> float:
    return round(float(np.quantile(np.asarray(values), share)), 4)
