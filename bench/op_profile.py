"""Where a step goes: ONNX Runtime's own profile of a graph, summed by operator."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from mla_deploy.bench.contenders.rows import cache_rows
from mla_deploy.bench.interleave import scheduled
from mla_deploy.bench.sessions import Arrays, bound_call, open_session, session_options
from mla_deploy.bundle import Bundle

_STEPS = 10
_LINES = 14
_CONTAINERS = {"If", "Loop", "Scan"}  # their time is that of the nodes inside, which are listed


def profile_bundle(
    bundle: Bundle, context: int, *, threads: int, realtime: bool, name: str = "our"
) -> list[dict[str, Any]]:
    """The decode graph of a bundle at `context` tokens, its cache in floats or in codes."""
    path = bundle.graph("decode")
    feeds: Arrays = {
        "input_ids": np.full((1, 1), 7), "new_lengths": np.ones(1, np.int64),
        "cache_lengths": np.full(1, context - 1),
    }  # fmt: skip
    in_place = {}
    values = [value for value in bundle.inputs("decode") if value.name not in feeds]
    for value, rows_TW in zip(values, cache_rows(bundle.manifest, context), strict=True):
        feeds[value.name] = rows_TW.reshape(1, 1, context, -1)
        stem, _, layer = value.name.rpartition(".")
        in_place[f"{stem}_out.{layer}"] = value.name
    title = f"{name} decode step at {context}, by operator"
    packed = "quantized" in bundle.manifest["weights"]
    return profile_rows(
        title, path, feeds, in_place, threads=threads, realtime=realtime, packed=packed
    )


def profile_rows(
    title: str, model: ir.Model | Path, feeds: Arrays, in_place: Mapping[str, str], *,
    threads: int, realtime: bool, packed: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row per operator and output shape, most time first; milliseconds per step."""
    options = session_options(threads, packed=packed)
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = open_session(model, options)
        run, _ = bound_call(session, feeds, in_place)
        run()
        with scheduled(realtime):
            for _ in range(_STEPS):
                run()
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return [{"table": title, **row} for row in _summed(events)]


def _summed(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Kernel times after the first step."""
    kernels = [e for e in events if e["name"].endswith("_kernel_time")]
    micros: dict[tuple[str, str], float] = defaultdict(float)
    for event in kernels[len(kernels) // (_STEPS + 1) :]:
        shapes = event["args"].get("output_type_shape", [])
        shape = str(next(iter(shapes[0].values()))) if shapes else ""
        if event["args"]["op_name"] not in _CONTAINERS:
            micros[event["args"]["op_name"], shape] += event["dur"]
    total = sum(micros.values())
    ordered = sorted(micros.items(), key=lambda item: -item[1])
    rest = sum(time for _, time in ordered[_LINES:])
    return [
        {"operator": name, "output": shape, "ms": time / 1000 / _STEPS, "share": time / total}
        for (name, shape), time in [*ordered[:_LINES], (("the rest", ""), rest)]
    ]
