"""MiB of one process with a bundle: `resident_one.py BUNDLE decode|apart|joined PROMPT STEPS`.

Proportional set size of the whole process, freed heap given back first, so that pages which two
processes share count once. Started by `resident.py`, a process for each figure.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from mla_deploy.bundle import open_bundle
from mla_deploy.runtime.onnx_runner import OnnxRunner
from mla_deploy.runtime.sessions import GraphSessions

_THREADS = 2


class _Apart(GraphSessions):
    """A session for each graph."""

    joins = False


def main() -> None:
    bundle, how, prompt, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    sessions = GraphSessions if how == "joined" else _Apart
    runner = OnnxRunner(
        sessions(open_bundle(bundle), _THREADS),
        capacity=2 * prompt + steps,
        graph="decode" if how == "decode" else None,
    )
    # A decode graph alone takes a few tokens at once; what it keeps does not depend on how many.
    runner.prefill([list(range(8 if how == "decode" else prompt))])
    for step in range(steps):
        runner.decode([step])
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    told = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    print(int(told.split("Pss:")[1].split()[0]) / 1024)


if __name__ == "__main__":
    main()
