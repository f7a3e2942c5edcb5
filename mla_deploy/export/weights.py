"""The weight file: one `.safetensors`, laid out before a byte is read, then streamed.

Offsets follow from names, shapes and dtypes alone, so the graphs can point at their bytes first.
Tensors are read in blocks of rows, converted and written; memory holds one block, whatever the
size of the model. The absorbed halves w_uk_HNL and w_uv_HLV are cut from kv_b_proj on the way.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from math import prod
from typing import Protocol

import torch

from mla_deploy.checkpoint import WeightMap
from mla_deploy.errors import InputError, MlaDeployError
from mla_deploy.rewrite.weights import WeightUse

WEIGHT_FILE = "weights.safetensors"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_SAFETENSORS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
_BLOCK_BYTES = 64 * 1024 * 1024
_ALIGNMENT = 64
_FP16_MAX = 65504.0


class Writable(Protocol):
    """Where the weight file goes."""

    def write(self, data: bytes | memoryview, /) -> int: ...


@dataclass(frozen=True)
class StoredWeight:
    """One tensor of the weight file."""

    name: str
    use: WeightUse  # with the full parameter name
    shape: tuple[int, ...]
    dtype: str  # fp32 | fp16 | bf16

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass
class WeightLayout:
    """Every stored tensor and where its bytes will lie."""

    weights: dict[str, StoredWeight] = field(default_factory=dict)

    def add(self, weight: StoredWeight) -> None:
        """Both graphs name the weights they read; one that both read is stored once."""
        before = self.weights.setdefault(weight.name, weight)
        if before != weight:
            raise MlaDeployError("EXP-WEIGHT", f"{weight.name} is asked for in two forms")

    def header(self) -> bytes:
        """The file's length prefix and JSON header, padded so that data starts aligned."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for weight in self._ordered():
            entries[weight.name] = {
                "dtype": _SAFETENSORS[weight.dtype],
                "shape": list(weight.shape),
                "data_offsets": [offset, offset + weight.nbytes],
            }
            offset += weight.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    def ranges(self) -> dict[str, tuple[int, int]]:
        """name -> (offset in the file, length in bytes)."""
        offset = len(self.header())
        found = {}
        for weight in self._ordered():
            found[weight.name] = (offset, weight.nbytes)
            offset += weight.nbytes
        return found

    @property
    def total_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights.values())

    def _ordered(self) -> list[StoredWeight]:
        # Four-byte elements first: the others then never leave them unaligned. Halves of a weight
        # stand together, for they are cut from one reading.
        first: dict[str, int] = {}
        for place, weight in enumerate(self.weights.values()):
            first.setdefault(weight.use.parameter, place)
        return sorted(
            self.weights.values(), key=lambda w: (w.dtype != "fp32", first[w.use.parameter])
        )

    def write(
        self,
        stream: Writable,
        source: WeightMap,
        done: Callable[[int], None],
    ) -> None:
        """Stream every tensor; `done(bytes)` after each block.

        Raises: CKPT-NONFINITE, CKPT-RANGE (a value does not fit fp16).
        """
        stream.write(self.header())
        blocks = self._converted(source)
        # One block is written (and hashed) while the next is read: memory holds two.
        with _one_thread(), ThreadPoolExecutor(1, thread_name_prefix="mla-deploy-write") as writer:
            block = next(blocks, None)
            while block is not None:
                data = block.view(torch.uint8).numpy().data
                written = writer.submit(stream.write, data)
                try:
                    block = next(blocks, None)
                finally:
                    wait([written])  # nobody may close the stream meanwhile
                written.result()
                done(len(data))

    def _converted(self, source: WeightMap) -> Iterator[torch.Tensor]:
        last = _LastRead(source)
        for weight in self._ordered():
            for block in _blocks(weight, source, last):
                yield _converted(block, weight)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Torch on one thread: what it does here is bound by memory, and its idle helpers would spin
    on the processors that hash.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _LastRead:
    """Both halves of a weight are cut from one reading of it."""

    def __init__(self, source: WeightMap) -> None:
        self._source = source
        self._name = ""
        self._value = torch.empty(0)

    def read(self, name: str) -> torch.Tensor:
        if name != self._name:
            self._value = torch.empty(0)  # let it go before the next one is read
            self._name, self._value = name, self._source.read(name)
        return self._value


def _blocks(weight: StoredWeight, source: WeightMap, last: _LastRead) -> Iterator[torch.Tensor]:
    use = weight.use
    if use.half is not None:
        yield _half(last.read(use.parameter), use)
        return
    if use.parameter not in source.slices:
        parts = source.stacked_parts(use.parameter)
        if not parts:
            raise MlaDeployError("EXP-WEIGHT", f"no weight {use.parameter} to fill {weight.name}")
        yield from map(source.read, parts)
        return
    part = source.slices[use.parameter]
    rows = part.shape[0] if part.shape else 1
    step = max(1, _BLOCK_BYTES // max(1, prod(part.shape[1:]) * 4))
    if rows <= step or len(part.shape) < 2:
        yield source.read(use.parameter)
        return
    for start in range(0, rows, step):
        yield source.read_rows(use.parameter, start, min(rows, start + step))


def _half(w_kv_b: torch.Tensor, use: WeightUse) -> torch.Tensor:
    """kv_b_proj [H*(N+V), L] -> w_uk_HNL, or w_uv_HLV (transposed, so that no graph has to)."""
    w_HKL = w_kv_b.view(use.heads, use.nope + use.value, -1)
    if use.half == "w_uk_HNL":
        return w_HKL[:, : use.nope].contiguous()
    return w_HKL[:, use.nope :].transpose(1, 2).contiguous()


def _converted(block: torch.Tensor, weight: StoredWeight) -> torch.Tensor:
    if weight.dtype == "fp16" and block.dtype != torch.float16:
        peak = float(block.abs().max()) if block.numel() else 0.0
        if peak > _FP16_MAX:
            raise InputError(
                "CKPT-RANGE",
                f"{weight.use.parameter} holds a value of magnitude {peak:.6g}; fp16 ends at "
                f"{_FP16_MAX:.0f}",
                hint="export with --dtype bf16 or fp32",
                tensor=weight.use.parameter,
            )
    return block.to(DTYPES[weight.dtype]).contiguous().flatten()


def stored_dtype(shape: tuple[int, ...], num_experts: int, dtype: str) -> str:
    """Vectors and routers stay fp32: they are small, and a rounded router flips experts."""
    is_router = len(shape) == 2 and shape[0] == num_experts
    return "fp32" if len(shape) < 2 or is_router else dtype


def full_use(use: WeightUse, prefix: str, tied: Mapping[str, str]) -> WeightUse:
    """`use` with its parameter's full module name, tied names resolved."""
    name = f"{prefix}{use.parameter}"
    return WeightUse(tied.get(name, name), use.half, use.heads, use.nope, use.value)


def renamed_use(use: WeightUse, prefix: str) -> WeightUse:
    """`use` without a prefix of its parameter's name."""
    return WeightUse(use.parameter.removeprefix(prefix), use.half, use.heads, use.nope, use.value)


def half_name(use: WeightUse) -> str:
    """What an absorbed half is called in the weight file."""
    return f"{use.parameter.removesuffix('.weight')}.{use.half}"
