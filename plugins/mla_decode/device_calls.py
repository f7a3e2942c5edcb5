"""MlaDecode on a real GPU: the built plugin's own enqueue, and the compiled Triton kernels.

Neither TensorRT nor PyTorch is needed: memory, stream and graphs are `mla_deploy.device.cuda`'s.
`on_device.py` is what uses it.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mla_deploy.device.cuda import Cuda

from .reference import DTYPES, Array, Problem

SOURCES = Path(__file__).parent
STORAGES = ("plain", "int8", "fp8")  # by the numbers of src/step.h
_JUNK = 0xFF  # scratch and output as they may be found: every number a NaN
_MOST_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Sizes(ctypes.Structure):
    """`Sizes` of src/step.h."""

    _fields_ = [
        (name, ctypes.c_int32)
        for name in "batch new_tokens heads capacity latent rope tile rope_tile splits".split()
    ]


def sizes_of(call: Problem) -> Sizes:
    """Splits are left 0: who launches decides them."""
    batch, new, heads, _ = call.query_BSHE.shape
    capacity = call.cache_B1ME.shape[2]
    return Sizes(batch, new, heads, capacity, call.latent, call.rope, call.tile, call.rope_tile, 0)


@dataclass(frozen=True)
class Built:
    """The plugin's library, and the door to it."""

    plugin: Path
    door: Path

    def opened(self) -> ctypes.CDLL:
        door = ctypes.CDLL(str(self.door))
        door.mla_decode_open.restype = ctypes.c_void_p
        door.mla_decode_open.argtypes = [
            ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_float,
            ctypes.c_int,
        ]  # fmt: skip
        door.mla_decode_workspace.restype = ctypes.c_uint64
        door.mla_decode_workspace.argtypes = [ctypes.c_void_p]
        door.mla_decode_enqueue.argtypes = [ctypes.c_void_p] * 5
        door.mla_decode_close.argtypes = [ctypes.c_void_p]
        return door


def built_for(sm: int, folder: Path, headers: Path | None) -> Built:
    """The library for one SM, and the door, in `folder`. `headers`: where NvInfer.h lies, if CMake
    does not find it. Raises: RuntimeError with the compiler's words."""
    include = [] if headers is None else [f"-DTENSORRT_INCLUDE={headers}"]
    _done(["cmake", "-B", str(folder), "-S", str(SOURCES), "-DMLA_DEVICE_CHECK=ON",
           f"-DCMAKE_CUDA_ARCHITECTURES={sm}-real", *include])  # fmt: skip
    _done(["cmake", "--build", str(folder), "--parallel"])
    return Built(folder / "libmla_decode.so", folder / "libmla_decode_door.so")


def _done(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]}: {(done.stdout + done.stderr)[-2000:]}")


class Memory:
    """Arrays on the device, freed on leaving."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self._held = ExitStack()

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def empty(self, count: int) -> int:
        """`count` bytes, every one 0xFF."""
        junk = np.full(max(count, 1), _JUNK, np.uint8)
        return self.copied(junk)

    def allocated(self, count: int) -> int:
        """`count` bytes of zeros."""
        address = self.cuda.allocate(count)
        self._held.callback(self.cuda.free, address)
        return address

    def copied(self, array: Array) -> int:
        contiguous = np.ascontiguousarray(array)
        address = self.allocated(contiguous.nbytes)
        if contiguous.nbytes:
            self.cuda.to_device(address, contiguous)
        return address

    def read(self, address: int, like: Array) -> Array:
        found = np.empty_like(np.ascontiguousarray(like))
        if found.nbytes:
            self.cuda.to_host(found, address)
        return found


class DeviceCall:
    """A problem's cache and output on the device."""

    def __init__(self, memory: Memory, call: Problem, dtype: str) -> None:
        self.call, self.memory = call, memory
        batch, new, heads, _ = call.query_BSHE.shape
        self._out = np.zeros((batch, new, heads, call.latent), DTYPES[dtype])
        self.cache, self.scales = memory.copied(call.cache_B1ME), memory.copied(call.scales_B1MG)
        self.out = memory.empty(self._out.nbytes)

    def enqueue(self) -> None:
        """Give the stream the whole call, to be run as often as wanted."""
        raise NotImplementedError

    def results(self) -> tuple[Array, Array, Array]:
        """out_BSHL, cache and scales, once the stream is done."""
        read = self.memory.read
        return (read(self.out, self._out), read(self.cache, self.call.cache_B1ME),
                read(self.scales, self.call.scales_B1MG))  # fmt: skip


class PluginCall(DeviceCall):
    """Through the built plugin's own enqueue. Raises: ValueError when it refuses the sizes."""

    def __init__(
        self, built: Built, memory: Memory, call: Problem, dtype: str, multiprocessors: int
    ) -> None:
        super().__init__(memory, call, dtype)
        self._door = built.opened()
        sizes, storage = sizes_of(call), STORAGES.index(call.storage)
        self._held = self._door.mla_decode_open(
            os.fsencode(built.plugin), ctypes.addressof(sizes), list(DTYPES).index(dtype), storage,
            call.scale, multiprocessors,
        )  # fmt: skip
        if not self._held:
            raise ValueError("the plugin refuses these sizes")
        self.scratch_bytes = int(self._door.mla_decode_workspace(self._held))
        inputs = [memory.copied(call.query_BSHE), memory.copied(call.new_row_BSE), self.cache,
                  memory.copied(call.cache_lengths_B), memory.copied(call.new_lengths_B),
                  self.scales]  # fmt: skip
        self._inputs = (ctypes.c_void_p * 6)(*inputs)
        self._outputs = (ctypes.c_void_p * 3)(self.out, self.cache, self.scales)
        self._scratch = memory.empty(self.scratch_bytes)

    def enqueue(self) -> None:
        answer = self._door.mla_decode_enqueue(
            self._held, self._inputs, self._outputs, self._scratch, self.memory.cuda.stream
        )
        if answer != 0:
            raise RuntimeError(f"enqueue answered {answer}")

    def close(self) -> None:
        self._door.mla_decode_close(self._held)


class CompiledTriton:
    """What `aot.py` wrote into a folder, for one SM."""

    def __init__(self, folder: Path, sm: int) -> None:
        facts = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        self.variant = facts["variant"]
        self._folder = folder
        self._rows = {row["step"]: row for row in facts["kernels"] if row["sm"] == sm}
        if not self._rows:
            raise ValueError(f"{folder} holds no kernel for SM {sm}")

    def takes(self, call: Problem, dtype: str) -> bool:
        """Scale and widths are compiled in; 32 rows a block where there are more than 16."""
        given, (_, new, heads, _) = self.variant, call.query_BSHE.shape
        rows = 32 if new * heads > 16 and call.storage == "plain" else 16
        tiles = (call.tile, call.rope_tile)
        coded = call.storage == "plain" or tiles == (given["tile"], given["rope_tile"])
        names = ("dtype", "storage", "latent", "rope", "rows", "scale")
        wanted = (dtype, call.storage, call.latent, call.rope, rows, call.scale)
        return coded and tuple(given[name] for name in names) == wanted

    def launch(
        self, step: str, grid: tuple[int, int, int], values: Sequence[Any], stream: int
    ) -> Launch:
        """Of `step` over `grid`; `values` are ctypes numbers, in the kernel's order."""
        row, driver = self._rows[step], ctypes.CDLL("libcuda.so.1")
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        cubin, shared = (self._folder / row["cubin"]).read_bytes(), int(row["shared_bytes"])
        for status in (
            driver.cuModuleLoadData(ctypes.byref(module), cubin),
            driver.cuModuleGetFunction(ctypes.byref(function), module, row["entry"].encode()),
            driver.cuFuncSetAttribute(function, _MOST_DYNAMIC_SHARED, shared),
        ):
            _answered(status, row["entry"])
        return Launch(driver, function, (*grid, int(row["threads"]), 1, 1, shared), values, stream)


@dataclass(frozen=True)
class Launch:
    """One launch by CUDA's driver; `shape` is the grid, the block and its shared memory."""

    driver: ctypes.CDLL
    function: ctypes.c_void_p
    shape: tuple[int, ...]
    values: Sequence[Any]
    stream: int

    def __call__(self) -> None:
        pointers = (ctypes.c_void_p * len(self.values))(*map(ctypes.addressof, self.values))
        stream = ctypes.c_void_p(self.stream)
        status = self.driver.cuLaunchKernel(self.function, *self.shape, stream, pointers, None)
        _answered(status, "cuLaunchKernel")


class TritonCall(DeviceCall):
    """By the three compiled kernels, launched as TensorRT launches them."""

    def __init__(
        self, kernels: CompiledTriton, memory: Memory, call: Problem, dtype: str, splits: int
    ) -> None:
        super().__init__(memory, call, dtype)
        batch, new, heads, _ = call.query_BSHE.shape
        rows = batch * new * heads
        partial = memory.empty(4 * rows * splits * call.latent)
        log_sum = memory.empty(4 * rows * splits)
        coded = [self.scales] if call.storage != "plain" else []
        lengths = [memory.copied(call.cache_lengths_B), memory.copied(call.new_lengths_B)]
        capacity = call.cache_B1ME.shape[2]
        append = _values([memory.copied(call.new_row_BSE), self.cache, *coded, *lengths],
                         [new, capacity], [self.cache, *coded])  # fmt: skip
        attend = _values([memory.copied(call.query_BSHE), self.cache, *coded, *lengths],
                         [new, heads, capacity, splits], [partial, log_sum])  # fmt: skip
        join = _values([partial, log_sum], [splits], [self.out])
        blocks = -(-new * heads // int(kernels.variant["rows"]))
        stream = memory.cuda.stream
        self._launches = [
            kernels.launch("append", (new, batch, 1), append, stream),
            kernels.launch("attend", (blocks, splits, batch), attend, stream),
            kernels.launch("join", (rows, 1, 1), join, stream),
        ]

    def enqueue(self) -> None:
        for launch in self._launches:
            launch()


def _values(inputs: list[int], numbers: list[int], outputs: list[int]) -> list[Any]:
    pointers = ctypes.c_void_p
    return [*map(pointers, inputs), *map(ctypes.c_int32, numbers), *map(pointers, outputs)]


def _answered(status: int, what: str) -> None:
    if status != 0:
        raise RuntimeError(f"{what}: CUDA's driver answers {status}")
