"""What one decode step allocates: never a copy of the cache, at any context."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mla_deploy
from mla_deploy.bundle import Bundle, open_bundle
from mla_deploy.runtime import OnnxRunner
from mla_deploy.runtime.sessions import GraphSessions
from tests.tiny import write_preset

SHORT, LONG = 2048, 24576
# Rows as wide as published ones, few heads: scores are small beside the cache.
SIZES = {"kv_lora_rank": 512, "max_position_embeddings": 1 << 16}


class Unpooled(GraphSessions):
    """Each tensor is allocated when it is made and freed after its last use."""

    def _options(self, graph: Any) -> Any:
        options = super()._options(graph)
        options.enable_cpu_mem_arena = False
        return options


def peak_bytes(call: Any) -> int:
    """Bytes of private memory beyond what was there before that `call` took at its most."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    call()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text("utf-8")
    return int(text.split(f"{name}:")[1].split()[0]) * 1024


def grown_bytes(bundle: Bundle) -> tuple[int, int]:
    """(most bytes that a long step takes more than a short one, more bytes that it reads)."""
    sessions = Unpooled(bundle, threads=1)
    taken = {}
    for context in (SHORT, LONG):
        runner = OnnxRunner(sessions, capacity=LONG + 8)
        for buffer in runner._cache._buffers:  # type: ignore[union-attr]
            buffer[:] = 1  # touched, so that its pages are no growth of the step
        for _ in range(2):
            runner._lengths_B[:] = context
            taken[context] = peak_bytes(functools.partial(runner.decode, [5]))
    row_bytes = int(bundle.manifest["cache"]["bytes_per_token"])
    return taken[LONG] - taken[SHORT], (LONG - SHORT) * row_bytes


@pytest.mark.parametrize("cache_dtype", ["fp32", "int8", "int8-all"])
def test_a_step_allocates_scores_and_no_rows(cache_dtype: str, tmp_path: Path) -> None:
    """From 2k to 24k tokens: less than a fourth of the further rows that it reads.

    A copy of the rows of one layer of two would take half; widening codes, twice.
    """
    folder = write_preset(tmp_path / "checkpoint", "v3-all-dense", **SIZES)
    mla_deploy.export(folder, tmp_path / "bundle", cache_dtype=cache_dtype)
    # Every tensor of some size has pages of its own, given back at once.
    fixed = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    child = subprocess.run(
        [sys.executable, "-m", "tests.runtime.test_step_memory", str(tmp_path / "bundle")],
        capture_output=True, text=True, check=False, env={**os.environ, **fixed},
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    grown, read = map(int, child.stdout.split())
    assert 0 < grown < read / 4


if __name__ == "__main__":
    print(*grown_bytes(open_bundle(sys.argv[1])))
