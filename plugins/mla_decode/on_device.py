"""Checks and times MlaDecode on this machine's GPU, and writes what it found.

    python -m plugins.mla_decode.on_device --tensorrt-include DIR --json report.json

The library is built for this GPU (CMake, nvcc) and driven through its own enqueue, as TensorRT
drives it; no TensorRT is needed, only its headers. `--triton DIR`, which may be repeated, adds what
`python -m plugins.mla_decode.aot --out DIR --sm SM` compiled. Numbers are held against numpy
float64. A time is the median of replays of a CUDA graph that goes through several caches in turn,
as a model's layers do: none stays in the second-level cache. Ends with 1 where a check fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mla_deploy.device.cuda import Cuda
from mla_deploy.device.power import power_state
from mla_deploy.device_package.plugin_files import source_digest
from mla_deploy.rewrite.mla_decode import blocks_of_a_wave

from .device_calls import (
    STORAGES,
    Built,
    CompiledTriton,
    DeviceCall,
    Memory,
    PluginCall,
    TritonCall,
    built_for,
)
from .reference import CASES, DTYPES, TOLERANCE, Problem, Shape, expected, problem, same_bytes

Cases = dict[str, tuple[Shape, list[tuple[int, int]]]]
LONG: Cases = {
    "16 heads, 32k": (Shape(heads=16, capacity=32768), [(32767, 1)]),
    "128 heads, 4k, two new": (Shape(heads=128, new=2, capacity=4096), [(4094, 2), (1500, 1)]),
}
TILES = {"plain": (512, 32), "int8": (512, 32), "fp8": (128, 32)}
_REPLAYS = 15
_TURN_BYTES = 400 << 20  # of caches that a graph goes through: several second-level caches


@dataclass(frozen=True)
class Timed:
    """One line of the timings."""

    batch: int
    heads: int
    new: int
    context: int
    storage: str

    def problem(self, seed: int) -> Problem:
        """Full rows but for the new tokens, of random codes that are all numbers."""
        random = np.random.default_rng(seed)
        latent, wide = 512, 576
        tile, rope_tile = TILES[self.storage]
        rows = (self.batch, 1, self.context, wide)
        groups = 0 if self.storage == "plain" else latent // tile + 64 // rope_tile
        if self.storage == "plain":
            bits = random.integers(0x2E00, 0x3C00, rows, dtype=np.uint16)  # fp16, 0.09 to 1
            cache = (bits | random.integers(0, 2, rows, dtype=np.uint16) << 15).view(np.float16)
        else:
            codes = random.integers(0, 256, rows, dtype=np.uint8)
            cache = codes & 0xF7 if self.storage == "fp8" else codes.view(np.int8)
        query = random.standard_normal((self.batch, self.new, self.heads, wide)) / 8
        return Problem(
            query_BSHE=query.astype(np.float16),
            new_row_BSE=random.standard_normal((self.batch, self.new, wide)).astype(np.float16),
            cache_B1ME=cache,
            cache_lengths_B=np.full(self.batch, self.context - self.new, np.int64),
            new_lengths_B=np.full(self.batch, self.new, np.int64),
            scales_B1MG=np.full((self.batch, 1, self.context, groups), 0.01, np.float32),
            latent=latent, scale=1.5 * wide**-0.5, storage=self.storage, tile=tile,
            rope_tile=rope_tile,
        )  # fmt: skip

    def bytes_moved(self) -> int:
        """What no kernel can do without: every cached row once, queries, new rows and output."""
        tile, rope_tile = TILES[self.storage]
        row = 1152 if self.storage == "plain" else 576 + 4 * (512 // tile + 64 // rope_tile)
        rest = 2 * self.batch * self.new * (self.heads * (576 + 512) + 2 * 576)
        return self.batch * self.context * row + rest


TIMED = (
    *(Timed(1, heads, 1, context, storage)
      for heads in (16, 128) for context in (4096, 32768) for storage in STORAGES),
    Timed(1, 16, 4, 32768, "plain"), Timed(16, 16, 1, 4096, "plain"),
    Timed(16, 16, 1, 4096, "int8"), Timed(8, 128, 1, 4096, "plain"),
)  # fmt: skip


class Device:
    """The GPU, what is built for it, and the calls that a problem can be put to."""

    def __init__(self, built: Built, triton: list[CompiledTriton], blocks: list[int]) -> None:
        self.cuda = Cuda()
        self.built, self.triton, self.blocks = built, triton, blocks

    def calls(
        self, memory: Memory, given: Problem, dtype: str
    ) -> Iterator[tuple[str, Callable[[], DeviceCall]]]:
        """(backend, how its call is made)."""
        for blocks in self.blocks:
            made = partial(PluginCall, self.built, memory, given, dtype, blocks)
            yield f"CUDA, {blocks} blocks", made
        for compiled in self.triton:
            if compiled.takes(given, dtype):
                splits = self._splits(given, int(compiled.variant["rows"]))
                yield "Triton", partial(TritonCall, compiled, memory, given, dtype, splits)

    def _splits(self, given: Problem, rows: int) -> int:
        """As `splitsFor` of src/step.h, for one block on a multiprocessor."""
        batch, new, heads, _ = given.query_BSHE.shape
        tiles = batch * -(-new * heads // rows)
        most = -(-given.cache_B1ME.shape[2] // 128)
        return max(1, min(self.cuda.facts()["multiprocessors"] // tiles, most))

    def recorded(self, calls: list[DeviceCall]) -> int:
        """A graph of every call once."""
        self.cuda.begin_capture()
        for call in calls:
            call.enqueue()
        return self.cuda.end_capture()

    def copy_rate(self, count: int = 1 << 30) -> float:
        """GB/s of a copy within the device, bytes read and bytes written."""
        with Memory(self.cuda) as memory:
            source, to = (memory.allocated(count) for _ in range(2))
            self.cuda.begin_capture()
            for _ in range(8):
                self.cuda.copy_within(to, source, count)
            return 8 * 2 * count / self._median(self.cuda.end_capture()) / 1e9

    def seconds(self, calls: list[DeviceCall]) -> tuple[float, float, float]:
        """(median, least, most) seconds of one call."""
        graph = self.recorded(calls)
        times = sorted(t / len(calls) for t in self._times(graph))
        self.cuda.drop_graph(graph)
        return times[len(times) // 2], times[0], times[-1]

    def _median(self, graph: int) -> float:
        times = sorted(self._times(graph))
        return times[len(times) // 2]

    def _times(self, graph: int) -> list[float]:
        found = []
        for _ in range(_REPLAYS + 3):
            self.cuda.wait()
            begun = time.perf_counter()
            self.cuda.launch(graph)
            self.cuda.wait()
            found.append(time.perf_counter() - begun)
        return found[3:]


def check(device: Device, cases: Cases) -> Iterator[dict[str, Any]]:
    """Every case, type and storage: the first call, a second one, and one replayed from a graph."""
    for name, (shape, lengths) in cases.items():
        for dtype in DTYPES:
            for storage in STORAGES:
                given = problem(shape, lengths, dtype=dtype, storage=storage)
                wanted = expected(given)
                with Memory(device.cuda) as memory:
                    for backend, made in device.calls(memory, given, dtype):
                        facts = {"backend": backend, "case": name, "dtype": dtype,
                                 "storage": storage}  # fmt: skip
                        yield {**facts, **_checked(device, made(), wanted, dtype)}


def _checked(device: Device, call: DeviceCall, wanted: Any, dtype: str) -> dict[str, Any]:
    call.enqueue()
    out, cache, scales = call.results()
    call.enqueue()
    again = call.results()[0]
    graph = device.recorded([call])
    device.cuda.launch(graph)
    replayed = call.results()[0]
    device.cuda.drop_graph(graph)
    error = float(np.abs(out.astype(np.float64) - wanted[0]).max())
    cached = same_bytes(cache, wanted[1]) and same_bytes(scales, wanted[2])
    repeats = same_bytes(again, out) and same_bytes(replayed, out)
    return {
        "max_error": error, "tolerance": TOLERANCE[dtype], "cache_is_right": cached,
        "repeats_bit_for_bit": repeats, "passed": error < TOLERANCE[dtype] and cached and repeats,
    }  # fmt: skip


def timings(device: Device) -> Iterator[dict[str, Any]]:
    """Microseconds of one call, and the bandwidth that its least bytes make of it."""
    for timed in TIMED:
        given, moved = timed.problem(0), timed.bytes_moved()
        turn = max(2, min(64, _TURN_BYTES // moved))
        with Memory(device.cuda) as memory:
            for backend, made in device.calls(memory, given, "fp16"):
                median, least, most = device.seconds([made() for _ in range(turn)])
                yield {
                    "backend": backend, "batch": timed.batch, "heads": timed.heads,
                    "new_tokens": timed.new, "context": timed.context, "storage": timed.storage,
                    "microseconds": median * 1e6, "least": least * 1e6, "most": most * 1e6,
                    "bytes": moved, "gb_s": moved / median / 1e9,
                }  # fmt: skip


def report(device: Device, *, short: bool) -> dict[str, Any]:
    """What report.json holds; `short` leaves out long cases and timings."""
    facts = device.cuda.facts()
    checks = list(check(device, CASES if short else {**CASES, **LONG}))
    copied = device.copy_rate()
    rows = []
    for row in () if short else timings(device):
        rows.append({**row, "share_of_copy": row["gb_s"] / copied})
        print(_line(rows[-1]), flush=True)
    return {
        "device": facts, "power": power_state(), "source_sha256": source_digest(),
        "copy_gb_s": copied, "passed": all(row["passed"] for row in checks),
        "checks": checks, "timings": rows,
    }  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    shape = f"B {row['batch']:>2} H {row['heads']:>3} S {row['new_tokens']} T {row['context']:>5}"
    times = f"{row['microseconds']:8.1f} us ({row['least']:.1f} to {row['most']:.1f})"
    share = f"{row['gb_s']:6.0f} GB/s, {row['share_of_copy']:.0%} of a copy's"
    return f"{shape} {row['storage']:<5} {row['backend']:<16} {times} {share}"


def main() -> int:
    parser = argparse.ArgumentParser(description="check and time MlaDecode on this GPU")
    parser.add_argument("--tensorrt-include", type=Path, help="folder of NvInfer.h, to build")
    parser.add_argument(
        "--built", type=Path, help="folder of libmla_decode.so and libmla_decode_door.so"
    )
    parser.add_argument("--triton", type=Path, action="append", default=[], metavar="DIR")
    parser.add_argument("--blocks", type=int, action="append", help="of a wave, to try others")
    parser.add_argument("--short", action="store_true", help="short cases only, nothing timed")
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    facts = Cuda().facts()
    sm = int(facts["sm"].replace(".", ""))
    with tempfile.TemporaryDirectory() as folder:
        if given.built is not None:
            built = Built(given.built / "libmla_decode.so", given.built / "libmla_decode_door.so")
        else:
            built = built_for(sm, Path(folder), given.tensorrt_include)
        triton = [CompiledTriton(path, sm) for path in given.triton]
        device = Device(built, triton, given.blocks or [blocks_of_a_wave(facts["sm"])])
        made = report(device, short=given.short)
    given.json.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    failed = [row for row in made["checks"] if not row["passed"]]
    worst = max(row["max_error"] / row["tolerance"] for row in made["checks"])
    print(f"{len(made['checks'])} checks, {len(failed)} failed; worst error {worst:.2f} of what is "
          f"allowed; a copy moves {made['copy_gb_s']:.0f} GB/s")  # fmt: skip
    for row in failed[:10]:
        print("FAILED", row)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
