"""DeepSeek-V2-Lite's real shape, bf16 to bf16, streamed: seconds, peak memory, and the disk's pace.

27 layers, 64 experts, 31 GB. The checkpoint is sparse unless `--fill` writes it out (the disk must
hold it twice then). Copies of the same files come before and after the export, each in a process of
its own: `cached` is what `cp` does, `direct` goes past the page cache.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from scripts import run_script
from sparse import LITE, write_sparse
from table import Goal, Report, bench_arguments, show

from mla_deploy.bench.provenance import provenance

_MOST_GIB, _LEAST_PACE = 3.0, 0.7


def main() -> None:
    parser = bench_arguments(__doc__)
    parser.set_defaults(rounds=1)
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--fill", action="store_true", help="write the weights, leave no holes")
    options = parser.parse_args()
    with ExitStack() as cleanup:
        work = Path(tempfile.mkdtemp(prefix="bench-stream-", dir=options.work))
        cleanup.callback(shutil.rmtree, work, ignore_errors=True)
        report = Report("stream", provenance(
            options.threads, rounds=options.rounds, dtype="bf16", layers=options.layers,
            checkpoint="filled" if options.fill else "sparse",
        ))  # fmt: skip
        checkpoint = write_sparse(
            work / "checkpoint", {**LITE, "num_hidden_layers": options.layers}, "BF16"
        )
        if options.fill:
            _fill(checkpoint)
        exports, copies = _rounds(work, checkpoint, options)
        _report(report, exports, copies)
    show(report, options.json)


def _rounds(work: Path, checkpoint: Path, options: Any) -> tuple[list[Any], dict[str, list[Any]]]:
    copies: dict[str, list[Any]] = {"cached": [], "direct": []}
    exports = []
    for number in range(options.rounds + 1):
        for way, found in copies.items():
            found.append(json.loads(run_script("copy_once.py", checkpoint, work, way)))
        if number < options.rounds:
            out = work / "bundle"
            text = run_script("export_once.py", checkpoint, out, options.threads, 0, "bf16")
            exports.append({**json.loads(text), "bytes": _size(out)})
            shutil.rmtree(out)
        print(f"round {number} done", file=sys.stderr, flush=True)
    return exports, copies


def _report(report: Report, exports: list[Any], copies: dict[str, list[Any]]) -> None:
    paces = {way: _pace(found) for way, found in copies.items()}
    for way, found in copies.items():
        report.rows.append({"table": "stream", "what": f"copy, {way}", **_row(found, "seconds")})
    for export in exports:
        export["streaming"] = export["stages"]["weights"] - export["stages"]["rewrite"]
    for what, key in (("export, its weights", "streaming"), ("export, whole", "call_seconds")):
        report.rows.append({"table": "stream", "what": what, **_row(exports, key)})
    peak = max(export["peak_bytes"] for export in exports) / 2**30
    streaming = _pace(exports, "streaming")
    report.goals += [
        Goal("peak memory", peak, _MOST_GIB, "GiB", False),
        Goal("streaming / a copy", streaming / paces["cached"], _LEAST_PACE),
        Goal("streaming / a copy past the cache", streaming / paces["direct"], _LEAST_PACE),
        Goal("whole export / a copy", _pace(exports, "call_seconds") / paces["cached"],
             _LEAST_PACE),
    ]  # fmt: skip


def _row(found: list[Any], key: str) -> dict[str, Any]:
    return {"GB": found[0]["bytes"] / 1e9, "seconds": sum(f[key] for f in found) / len(found),
            "GB_per_s": _pace(found, key),
            "processor_s": sum(f["processor_seconds"] for f in found) / len(found)}  # fmt: skip


def _pace(found: list[Any], key: str = "seconds") -> float:
    """GB per second over all rounds."""
    return float(sum(f["bytes"] for f in found) / sum(f[key] for f in found) / 1e9)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _fill(checkpoint: Path) -> None:
    """Values as a model has them, the same few million over and over, in place of the holes."""
    values = np.random.default_rng(0).standard_normal(1 << 22, np.float32) * np.float32(0.02)
    block = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    for path in checkpoint.glob("*.safetensors"):
        with path.open("r+b") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            for offset in range(start, size, len(block)):
                os.pwrite(file.fileno(), block[: size - offset], offset)


if __name__ == "__main__":
    main()
