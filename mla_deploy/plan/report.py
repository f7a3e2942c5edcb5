"""What `plan` answers: the model, and a row for each device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mla_deploy.devices import Device

if TYPE_CHECKING:
    from mla_deploy.plan.memory import Memory
    from mla_deploy.plan.work import Bound

FORMAT_VERSION = 1
GIB = 1 << 30


@dataclass(frozen=True)
class Question:
    """What was asked for. `context` tokens in each of `batch` rows."""

    context: int
    batch: int
    weights: str | None
    cache: str | None


@dataclass(frozen=True)
class ModelFacts:
    """`parameters` are those of a checkpoint, `active_parameters` those that one token meets."""

    name: str
    model_type: str
    architecture: str
    parameters: int
    active_parameters: int
    parameters_by_part: Mapping[str, int]
    max_position_embeddings: int


@dataclass(frozen=True)
class RivalRow:
    """The same model and device with another attention's cache."""

    cache_bytes: int
    ratio: float  # to the latent cache
    longest_context: int
    decode: Bound | None


@dataclass(frozen=True)
class DevicePlan:
    """One device. Bytes; `longest_context` at the batch asked, `biggest_batch` at the context."""

    device: Device
    dtype: str
    cache_dtype: str
    usable_bytes: int
    memory: Memory
    longest_context: int
    biggest_batch: int
    build_host_bytes: int | None
    build_fits: bool | None
    decode: Bound | None
    prefill: Bound | None
    rivals: Mapping[str, RivalRow]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.free_bytes >= 0

    @property
    def free_bytes(self) -> int:
        """What is left; below zero, what is missing."""
        return self.usable_bytes - self.memory.total_bytes

    def to_dict(self) -> dict[str, Any]:
        device, memory = self.device, self.memory
        return {
            "device": device.name,
            "title": device.title,
            "target": device.target,
            "sm": device.row.sm,
            "release": device.row.release,
            "is_unified": device.is_unified,
            "source": device.source,
            "dtype": self.dtype,
            "cache_dtype": self.cache_dtype,
            "memory_bytes": round(device.memory_gib * GIB),
            "usable_bytes": self.usable_bytes,
            "needed_bytes": memory.total_bytes,
            "free_bytes": self.free_bytes,
            "fits": self.fits,
            **asdict(memory),
            "longest_context": self.longest_context,
            "biggest_batch": self.biggest_batch,
            "build_host_bytes": self.build_host_bytes,
            "build_fits": self.build_fits,
            "decode": None if self.decode is None else asdict(self.decode),
            "prefill": None if self.prefill is None else asdict(self.prefill),
            "rivals": {name: asdict(row) for name, row in self.rivals.items()},
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class PlanReport:
    """Every figure is computed from config.json; nothing was run."""

    model: ModelFacts
    question: Question
    devices: tuple[DevicePlan, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON result of `mla-deploy plan`."""
        return {
            "format_version": FORMAT_VERSION,
            "model": asdict(self.model),
            "context": self.question.context,
            "batch": self.question.batch,
            "weights": self.question.weights,
            "cache": self.question.cache,
            "devices": [row.to_dict() for row in self.devices],
            "notes": list(self.notes),
        }
