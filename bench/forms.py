"""Model-local functions against flat nodes: what ONNX Runtime and TensorRT-RTX do with both.

DeepSeek-V3's layers and experts, at a fraction of its width, as FP8 checkpoints exported in place:
the graph has as many nodes as that of the real one. `flat` is the same graph with every function
inlined by onnx's own inliner. Each tool runs in a process of its own, for LIMIT seconds at most.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx
from graph_checks import counted
from onnx.inliner import inline_local_functions
from scripts import run_script
from sparse import write_sparse
from table import Report, bench_arguments, show

from mla_deploy.bench.provenance import provenance

_SMALL: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128, "vocab_size": 1024,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 128, "kv_lora_rank": 128,
    "num_nextn_predict_layers": 0,
}  # fmt: skip
_SIZES = ((4, 16), (16, 64))  # layers, experts


def main() -> None:
    parser = bench_arguments(__doc__)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one tool")
    options = parser.parse_args()
    report = Report("forms", provenance(
        options.threads, weights="F8_E4M3", graph="decode", limit_seconds=options.limit,
        tensorrt_rtx=_version("tensorrt_rtx"),
    ))  # fmt: skip
    for layers, experts in _SIZES:
        with tempfile.TemporaryDirectory(prefix="bench-forms-", dir=options.work) as work:
            fields = {**_SMALL, "num_hidden_layers": layers, "n_routed_experts": experts}
            folder = write_sparse(Path(work) / "checkpoint", fields)
            run_script("huge_once.py", folder, options.threads)
            functions = next(folder.glob("*decode.onnx"))
            flat = functions.with_name("flat.onnx")
            model = onnx.load(str(functions), load_external_data=False)
            flat.write_bytes(inline_local_functions(model).SerializeToString())
            for form, path in (("functions", functions), ("flat", flat)):
                report.rows.append(_row(f"{layers} x {experts}", form, path, options.limit))
                print(report.rows[-1], file=sys.stderr, flush=True)
    show(report, options.json)


def _row(size: str, form: str, path: Path, limit: float) -> dict[str, Any]:
    facts = counted(path)
    row = {"table": "graph forms", "layers x experts": size, "form": form,
           "graph_MB": facts["file_bytes"] / 1e6,
           "nodes": facts["nodes"] + facts["nodes_in_functions"]}  # fmt: skip
    for step, name in (("session", "ort"), ("parser", "trt")):
        found = _ran(step, path, limit)
        row[f"{name}_processor_s"] = found.get("processor_s")
        row[f"{name}_s"], peak = found.get("seconds"), found.get("peak_bytes")
        row[f"{name}_GiB"] = None if peak is None else peak / 2**30
        if step == "parser":
            row["trt_layers"], row["trt_said"] = found.get("layers"), found.get("said", "")
    return row


def _ran(step: str, path: Path, limit: float) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(run_script("graph_checks.py", step, path, limit=limit))
    except subprocess.TimeoutExpired:
        return {"said": f"not done after {limit:.0f} s"}
    except subprocess.CalledProcessError as error:
        return {"said": f"ended with {error.returncode}"}
    return found


def _version(library: str) -> str:
    try:
        return str(__import__(library).__version__)
    except ImportError:
        return "absent"


if __name__ == "__main__":
    main()
