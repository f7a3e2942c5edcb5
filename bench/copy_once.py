"""Weight files copied in this process: `copy_once.py CHECKPOINT FOLDER WAY`, JSON out.

WAY `cached` is what a copy does (read, write, fsync); `direct` writes past the page cache, as an
export does with large files. Each copy is removed before the next file's is made.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
from pathlib import Path

_BLOCK = 8 << 20


def main(checkpoint: Path, folder: Path, way: str) -> dict[str, float]:
    """Seconds and bytes; removing is not timed."""
    seconds, copied = 0.0, 0
    for path in sorted(checkpoint.glob("*.safetensors")):
        target = folder / "copy"
        start = time.perf_counter()
        copied += _copy(path, target, os.O_DIRECT if way == "direct" else 0)
        seconds += time.perf_counter() - start
        target.unlink()
    return {"seconds": seconds, "bytes": copied, "processor_seconds": time.process_time()}


def _copy(path: Path, target: Path, flag: int) -> int:
    source = os.open(path, os.O_RDONLY)
    out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flag)
    with memoryview(mmap.mmap(-1, _BLOCK)) as block:  # aligned
        size = os.fstat(source).st_size
        for start in range(0, size, _BLOCK):
            count = min(_BLOCK, size - start)
            os.preadv(source, [block[:count]], start)
            if count < _BLOCK:
                os.close(out)
                out = os.open(target, os.O_WRONLY | os.O_APPEND)
            os.write(out, block[:count])
    os.fsync(out)
    os.close(out)
    os.close(source)
    return size


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])))
