"""Rows of the export bench: one model's rounds, and what transformers' exporter took."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from scripts import run_module, run_script

from mla_deploy.bench.interleave import Timing


def export_once(checkpoint: Path, out: Path, threads: int, realtime: bool) -> dict[str, float]:
    """One export in a process of its own, the bundle removed."""
    start = time.perf_counter()
    text = run_script("export_once.py", checkpoint, out, threads, int(realtime))
    found: dict[str, float] = json.loads(text)
    shutil.rmtree(out)
    return {**found, "process_seconds": time.perf_counter() - start}


def export_row(
    name: str, fields: dict[str, Any], results: list[dict[str, float]], checkpoint: Path
) -> dict[str, Any]:
    """A row of the table from the rounds of one model."""
    call, process = (
        Timing(tuple(r[key] for r in results)) for key in ("call_seconds", "process_seconds")
    )
    size = (checkpoint / "model.safetensors").stat().st_size
    return {
        "table": "export", "model": f"{name} ({fields['num_hidden_layers']} layers)",
        "call_s": call.median, "spread_s": f"{call.best:.1f}-{max(call.seconds):.1f}",
        "processor_s": min(r["processor_seconds"] for r in results),
        "process_s": process.median, "peak_MiB": max(r["peak_bytes"] for r in results) / 2**20,
        "checkpoint_MiB": size / 2**20,
        "largest_MiB": results[0]["largest_tensor_bytes"] / 2**20,
    }  # fmt: skip


def peer_row(work: Path, limit: float) -> dict[str, Any]:
    """transformers' OnnxExporter, its decode graph only, on the shallow model."""
    row: dict[str, Any] = {"table": "export", "model": "shallow, OnnxExporter"}
    try:
        text = run_module(
            "mla_deploy.bench.exporter_graph", work / "shallow", work / "peer", limit=limit
        )
    except subprocess.TimeoutExpired:
        return {**row, "spread_s": f"no result in {limit:g} s"}
    except subprocess.CalledProcessError as problem:
        return {**row, "spread_s": f"failed with {problem.returncode}"}
    return {**row, "call_s": json.loads(text.strip().splitlines()[-1])["seconds"]}
