"""One export in this process: `export_once.py CHECKPOINT OUT THREADS REALTIME [DTYPE]`, JSON out.

Peak memory is VmHWM, which starts afresh with the program; `ru_maxrss` would still hold the peak
of the process that started this one. Mapped file pages count.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main(
    checkpoint: Path, out: Path, threads: int, realtime: bool, dtype: str | None = None
) -> dict[str, Any]:
    """Seconds of the call with its imports, and of processor time, which no other load changes;
    bytes resident before and at the peak; seconds at the end of each stage.
    """
    if realtime:
        with contextlib.suppress(OSError):  # threads started later inherit it
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    start = time.perf_counter()
    import torch

    from mla_deploy import export, open_checkpoint

    torch.set_num_threads(threads)
    before = resident("VmRSS")
    stages: dict[str, float] = {}

    def progress(stage: str, _done: int, _total: int) -> None:
        stages[stage] = time.perf_counter() - start

    export(checkpoint, out, dtype=dtype, progress=progress)
    seconds = time.perf_counter() - start
    with open_checkpoint(checkpoint) as source:
        largest = max(tensor.nbytes for tensor in source.tensors.values())
    return {
        "call_seconds": seconds, "processor_seconds": time.process_time(),
        "before_bytes": before, "peak_bytes": resident("VmHWM"),
        "largest_tensor_bytes": largest, "stages": stages,
    }  # fmt: skip


def resident(field: str) -> int:
    """Bytes that a field of this process's status tells."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    folders, (threads, realtime) = sys.argv[1:3], map(int, sys.argv[3:5])
    dtype = sys.argv[5] if len(sys.argv) > 5 else None
    print(json.dumps(main(Path(folders[0]), Path(folders[1]), threads, bool(realtime), dtype)))
