"""The weight file: one `.safetensors`, laid out before a byte is read, then streamed.

Offsets follow from names, shapes and dtypes alone, so the graphs can point at their bytes first.
Tensors are read in blocks, converted and written; memory holds a few blocks, whatever the size of
the model. The absorbed halves w_uk_HNL and w_uv_HLV are cut from kv_b_proj on the way, and weights
are quantised.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

import torch

from mla_deploy.checkpoint import Checkpoint, TensorSlice, WeightMap
from mla_deploy.errors import InputError, MlaDeployError
from mla_deploy.export.copied import CopiedTensor
from mla_deploy.export.gather import CHUNK_BYTES, Gather, Writable
from mla_deploy.rewrite.weights import WeightUse
from mla_deploy.weight_forms.channel_scales import ChannelScales
from mla_deploy.weight_forms.one_thread import one_thread
from mla_deploy.weight_forms.parts import Part, part_bytes

if TYPE_CHECKING:
    from mla_deploy.export.static_scales import LatentScales

WEIGHT_FILE = "weights.safetensors"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_SAFETENSORS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
# Parts of quantised weights; four-bit ones lie two to a byte, for safetensors has no name for them.
_BYTES = {"uint8": "U8", "int8": "I8", "int4": "U8", "fp8": "F8_E4M3"}
_BLOCK_BYTES = 64 * 1024 * 1024
_ALIGNMENT = 64
_FP16_MAX = 65504.0


class WeightSource(Protocol):
    """Where weights are read: a checkpoint's map, or a module."""

    @property
    def slices(self) -> Mapping[str, Shaped]: ...

    def read(self, name: str, /) -> torch.Tensor: ...

    def read_rows(self, name: str, start: int, stop: int, /) -> torch.Tensor: ...

    def stacked_parts(self, name: str, /) -> tuple[str, ...]: ...


class Shaped(Protocol):
    """A place that tells its shape."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class StoredWeight:
    """One tensor of the weight file."""

    name: str
    use: WeightUse  # with the full parameter name
    shape: tuple[int, ...]  # in the graph
    dtype: str  # fp32 | fp16 | bf16, of a part also uint8 | int8 | int4 | fp8

    @property
    def item_bytes(self) -> int:
        return DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 1

    @property
    def file_shape(self) -> tuple[int, ...]:
        """As the file's header tells it."""
        return (prod(self.shape) // 2,) if self.dtype == "int4" else self.shape

    @property
    def nbytes(self) -> int:
        return prod(self.file_shape) * self.item_bytes

    @property
    def unit(self) -> int:
        """What a place in the file after it is a multiple of, if it began at such a place."""
        if self.use.part is None:
            return self.item_bytes
        return 4 if self.nbytes % 4 == 0 else self.item_bytes

    @property
    def file_dtype(self) -> str:
        """As safetensors calls it."""
        return _SAFETENSORS.get(self.dtype) or _BYTES[self.dtype]


@dataclass
class WeightLayout:
    """Every stored tensor and where its bytes will lie; `copied` are taken over bit by bit.

    `rounded`: parts of weights that are quantised already, by the weight's name; `calibration`:
    what the manifest tells of how. `scales`: of channels, folded into what `source` gives.
    `latent_scales`: of latents in static codes, which lie in the graphs.
    """

    weights: dict[str, StoredWeight] = field(default_factory=dict)
    copied: dict[str, CopiedTensor] = field(default_factory=dict)
    rounded: dict[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    scales: ChannelScales = field(default_factory=ChannelScales)
    latent_scales: LatentScales | None = None

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
                "dtype": weight.file_dtype,
                "shape": list(weight.file_shape),
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
        return sum(weight.nbytes for weight in self._ordered())

    def _ordered(self) -> list[StoredWeight | CopiedTensor]:
        # Wide elements first: the others then never leave them unaligned. Halves of a weight and
        # its quantised parts stand together, for they are made from one reading.
        first: dict[str, int] = {}
        for place, weight in enumerate(self.weights.values()):
            first.setdefault(weight.use.parameter, place)
        made = sorted(self.weights.values(), key=lambda w: first[w.use.parameter])
        return sorted([*made, *self.copied.values()], key=lambda w: -w.unit)

    def write(
        self,
        stream: Writable,
        source: WeightSource,
        done: Callable[[int], None],
    ) -> None:
        """Stream every tensor; `done(bytes)` after each block that was read.

        Raises: CKPT-NONFINITE, CKPT-RANGE (a value does not fit fp16).
        """
        stream.write(self.header())
        last = _LastRead(source, self.rounded)
        # What torch does here is bound by memory; the processors hash meanwhile.
        with one_thread(), Gather(stream) as gather:
            for weight in self._ordered():
                left = weight.nbytes
                for count in _gathered(weight, source, last, gather):
                    left -= count
                    done(count)
                if left:
                    told = f"{weight.name} took {-left:+,} bytes beside its {weight.nbytes:,}"
                    raise MlaDeployError("EXP-WEIGHT", told)
            gather.finish()


def _gathered(
    weight: StoredWeight | CopiedTensor, source: WeightSource, last: _LastRead, gather: Gather
) -> Iterator[int]:
    """Gather one tensor; the bytes of each block."""
    if isinstance(weight, CopiedTensor):
        yield from weight.gather(_checkpoint_of(source), gather, _BLOCK_BYTES)
        return
    plain = _plain(weight, source) if isinstance(source, WeightMap) else None
    if plain is not None and isinstance(source, WeightMap):
        yield from _converted_rooms(plain, weight, source, gather)
        return
    for block in _blocks(weight, source, last):
        _require_range(block, weight)
        dtype = DTYPES.get(weight.dtype, block.dtype)
        data = block.to(dtype).contiguous().flatten()
        gather.put(data.view(torch.uint8).numpy().data)
        yield data.nbytes


def _checkpoint_of(source: WeightSource) -> Checkpoint:
    if not isinstance(source, WeightMap):
        raise MlaDeployError("EXP-WEIGHT", "only a checkpoint's weights are copied as they are")
    return source.checkpoint


def _plain(weight: StoredWeight, source: WeightMap) -> CopiedTensor | None:
    """Where a weight lies whole and in float, None where it has to be made."""
    part = source.slices.get(weight.use.parameter)
    if weight.use.half or weight.use.part or not isinstance(part, TensorSlice):
        return None
    if source.checkpoint.scheme(part.tensor) is not None or part.dtype not in _SAFETENSORS.values():
        return None
    first = part.first_value(source.checkpoint.tensors[part.tensor].shape)
    return CopiedTensor(weight.name, part.tensor, first, part.shape, part.dtype)


def _converted_rooms(
    plain: CopiedTensor, weight: StoredWeight, source: WeightMap, gather: Gather
) -> Iterator[int]:
    """Read straight into the chunk that is written, or convert from the scratch memory into it."""
    if plain.file_dtype == weight.file_dtype:
        yield from plain.gather(source.checkpoint, gather, _BLOCK_BYTES)
        return
    start, count = 0, prod(plain.shape)
    widest = max(plain.item_bytes, weight.item_bytes)
    while start < count:
        most = min(count - start, max(1, min(_BLOCK_BYTES, CHUNK_BYTES) // widest))
        room = gather.room(most * weight.item_bytes)
        size = len(room) // weight.item_bytes
        raw = gather.scratch(size * plain.item_bytes)
        block = source.checkpoint.read_stored(plain.tensor, plain.first + start, (size,), raw)
        _require_range(block, weight)
        torch.frombuffer(room, dtype=DTYPES[weight.dtype]).copy_(block)
        gather.take(len(room))
        yield len(room)
        start += size


class _LastRead:
    """Both halves of a weight are cut from one reading of it, all parts from one rounding."""

    def __init__(
        self, source: WeightSource, rounded: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> None:
        self._source = source
        self.rounded = rounded
        self._name = ""
        self._value = torch.empty(0)
        self._use: WeightUse | None = None  # whose parts are held, whatever their names
        self._parts: dict[str, torch.Tensor] = {}

    def read(self, name: str) -> torch.Tensor:
        if name != self._name:
            self._value = torch.empty(0)  # let it go before the next one is read
            self._name, self._value = name, self._source.read(name)
        return self._value

    def parts(
        self, use: WeightUse, part: Part, blocks: Iterator[torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        """`part` of each block; those of a weight of one block are made once and held."""
        whole = replace(use, part=replace(part, name=""))
        if whole == self._use:
            yield self._parts[part.name]
            return
        self._use, self._parts = None, {}
        first = next(blocks)
        second = next(blocks, None)
        found = part_bytes(first, part)
        if second is None:
            self._use, self._parts = whole, found
        yield found[part.name]
        for block in chain(() if second is None else (second,), blocks):
            yield part_bytes(block, part)[part.name]


def _blocks(weight: StoredWeight, source: WeightSource, last: _LastRead) -> Iterator[torch.Tensor]:
    part = weight.use.part
    if part is not None:
        known = last.rounded.get(stored_name(replace(weight.use, part=None)))
        if known is not None:
            return iter((known[part.name],))
    blocks = _float_blocks(weight, source, last)
    return blocks if part is None else last.parts(weight.use, part, blocks)


def _float_blocks(
    weight: StoredWeight, source: WeightSource, last: _LastRead
) -> Iterator[torch.Tensor]:
    use = weight.use
    if use.half is not None:
        yield _half(last.read(use.parameter), use)
        return
    if use.parameter not in source.slices:
        parts = source.stacked_parts(use.parameter)
        if not parts:
            raise MlaDeployError("EXP-WEIGHT", f"no weight {use.parameter} to fill {weight.name}")
        yield from _stack(parts, weight, source)
        return
    part = source.slices[use.parameter]
    rows = part.shape[0] if part.shape else 1
    step = max(1, _BLOCK_BYTES // max(1, prod(part.shape[1:]) * 4))
    if rows <= step or len(part.shape) < 2:
        yield source.read(use.parameter)
        return
    for start in range(0, rows, step):
        yield source.read_rows(use.parameter, start, min(rows, start + step))


def _stack(
    parts: Sequence[str], weight: StoredWeight, source: WeightSource
) -> Iterator[torch.Tensor]:
    """Of a stack of experts what the graph reads: a class may keep rows behind, and save them."""
    left = prod(weight.shape) if weight.use.part is None else -1
    for name in parts:
        if left == 0:
            return
        block = source.read(name)
        left -= block.numel()
        yield block


def _half(w_kv_b: torch.Tensor, use: WeightUse) -> torch.Tensor:
    """kv_b_proj [H*(N+V), L] -> w_uk_HNL, or w_uv_HLV (transposed, so that no graph has to)."""
    w_HKL = w_kv_b.view(use.heads, use.nope + use.value, -1)
    if use.half == "w_uk_HNL":
        return w_HKL[:, : use.nope].contiguous()
    return w_HKL[:, use.nope :].transpose(1, 2).contiguous()


def _require_range(block: torch.Tensor, weight: StoredWeight) -> None:
    if weight.dtype != "fp16" or block.dtype == torch.float16 or not block.numel():
        return
    low, high = torch.aminmax(block)
    peak = max(-float(low), float(high))
    if peak > _FP16_MAX:
        raise InputError(
            "CKPT-RANGE",
            f"{weight.use.parameter} holds a value of magnitude {peak:.6g}; fp16 ends at "
            f"{_FP16_MAX:.0f}",
            hint="export with --dtype bf16 or fp32",
            tensor=weight.use.parameter,
        )


def stored_dtype(shape: tuple[int, ...], router_rows: int, dtype: str) -> str:
    """Vectors and routers stay fp32: they are small, and a rounded router flips experts.

    `router_rows`: `MlaConfig.router_rows`.
    """
    is_router = len(shape) == 2 and shape[0] == router_rows
    return "fp32" if len(shape) < 2 or is_router else dtype


def full_use(use: WeightUse, prefix: str, tied: Mapping[str, str]) -> WeightUse:
    """`use` with its parameter's full module name, tied names resolved."""
    name = f"{prefix}{use.parameter}"
    return replace(use, parameter=tied.get(name, name))


def renamed_use(use: WeightUse, prefix: str) -> WeightUse:
    """`use` without a prefix of its parameter's name."""
    return replace(use, parameter=use.parameter.removeprefix(prefix))


def stored_name(use: WeightUse) -> str:
    """What a weight, an absorbed half, or a part of one quantised is called in the weight file."""
    name = use.parameter
    if use.half is not None:
        name = f"{name.removesuffix('.weight')}.{use.half}"
    return name if use.part is None else f"{name}.{use.part.name}"
