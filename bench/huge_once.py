"""One export in place in this process: `huge_once.py CHECKPOINT THREADS`, JSON out.

What is read is counted where our reader reads it, tensor by tensor; headers and texts are not.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from export_once import resident


def main(checkpoint: Path, threads: int) -> dict[str, Any]:
    """Seconds with imports, bytes resident at the peak, and which tensors were read."""
    start = time.perf_counter()
    import torch

    from mla_deploy import export
    from mla_deploy.checkpoint.shards import Shards

    torch.set_num_threads(threads)
    read: dict[str, int] = {}
    read_into = Shards.read_into

    def counted(self: Shards, buffer: memoryview, file: str, offset: int, tensor: str) -> None:
        read[tensor] = read.get(tensor, 0) + len(buffer)
        read_into(self, buffer, file, offset, tensor)

    Shards.read_into = counted  # type: ignore[method-assign]
    stages: dict[str, float] = {}

    def progress(stage: str, done: int, total: int) -> None:
        stages[stage] = round(time.perf_counter() - start, 2)

    bundle = export(checkpoint, in_place=True, replace=True, progress=progress)
    return {
        "seconds": time.perf_counter() - start, "processor_seconds": time.process_time(),
        "peak_bytes": resident("VmHWM"), "stages": stages,
        "read_bytes": sum(read.values()), "read_tensors": sorted(read),
        "weights": bundle.manifest["weights"],
        "kept_tensors": bundle.manifest["in_place"]["tensors"], "kept_bytes": bundle.kept_bytes,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
