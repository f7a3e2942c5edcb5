"""A DeepSeek-V3 of 671 billion parameters, exported in place from sparse files.

The checkpoint has the published names, dtypes, shapes and shard sizes (`sparse.py`); its data are
holes, so it takes megabytes of disk. Measured: seconds, memory and which weights are read; then the
graphs before ONNX's checker and shape inference by path, and the bundle before our own reader.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from scripts import run_script
from sparse import write_sparse
from table import Goal, Report, bench_arguments, show

from mla_deploy.bench.provenance import provenance

_GIB = 2**30


def main() -> None:
    parser = bench_arguments(__doc__)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--experts", type=int, default=256)
    options = parser.parse_args()
    fields = {"num_hidden_layers": options.layers, "n_routed_experts": options.experts}
    report = Report("huge", provenance(options.threads, weights="F8_E4M3", **fields))
    with tempfile.TemporaryDirectory(prefix="bench-huge-", dir=options.work) as work:
        folder = write_sparse(Path(work) / "checkpoint", fields)
        sizes = [path.stat() for path in folder.iterdir()]
        report.rows.append({
            "table": "the checkpoint", "files": len(sizes),
            "apparent_GB": sum(s.st_size for s in sizes) / 1e9,
            "on_disk_MB": sum(s.st_blocks * 512 for s in sizes) / 1e6,
        })  # fmt: skip
        made = json.loads(run_script("huge_once.py", folder, options.threads))
        report.rows.append(_export_row(made))
        for graph in ("decode", "prefill"):
            path = next(folder.glob(f"*{graph}.onnx"))
            for step in ("checker", "inference"):
                report.rows.append(_checked(step, path))
        report.rows.append(_checked("reader", folder))
    report.goals += [
        Goal("export in place", made["seconds"], 600.0, "s", at_least=False),
        Goal("resident memory", made["peak_bytes"] / _GIB, 2.0, "GiB", at_least=False),
        Goal("weights read that were not needed", float(_needless(made)), 0.0, "", at_least=False),
    ]
    show(report, options.json)


def _export_row(made: dict[str, Any]) -> dict[str, Any]:
    return {
        "table": "the export", "seconds": made["seconds"],
        "processor_s": made["processor_seconds"], "peak_GiB": made["peak_bytes"] / _GIB,
        "kept_tensors": made["kept_tensors"], "kept_GB": made["kept_bytes"] / 1e9,
        "read_tensors": len(made["read_tensors"]), "read_GB": made["read_bytes"] / 1e9,
        "written_GB": made["weights"]["bytes"] / 1e9,
    }  # fmt: skip


def _needless(made: dict[str, Any]) -> int:
    """Tensors read besides the latent expansions, which alone are made anew."""
    return sum(".kv_b_proj." not in name for name in made["read_tensors"])


def _checked(step: str, path: Path) -> dict[str, Any]:
    found = json.loads(run_script("graph_checks.py", step, path))
    peak = found.pop("peak_bytes") / _GIB
    return {"table": step, "of": path.name, "peak_GiB": peak, **found}


if __name__ == "__main__":
    main()
