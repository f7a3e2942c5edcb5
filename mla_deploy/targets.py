"""The deployment targets, as data: what runs there, on what, and whether this release builds it.

Figures are the vendors' published ones for the part named in `notes`; none is measured here.
Memory is GiB as sold (a Jetson's and a DGX Spark's pool is shared with the CPU); bandwidth GB/s.
"""

from __future__ import annotations

from dataclasses import dataclass

from mla_deploy.errors import InputError, quoted


@dataclass(frozen=True)
class Target:
    """One row of the table. `None` means that it depends on the machine."""

    name: str
    runtime: str
    sm: str | None
    memory_gib: int | None
    bandwidth_gb_s: float | None
    dtypes: tuple[str, ...]
    cache_update: str
    notes: str
    release: str | None = None  # of TensorRT: a row of `rewrite/releases.py`
    runs_now: bool = False
    stores: tuple[str, ...] = ()  # weights beyond `dtypes` that a graph for it can widen itself

    @property
    def default_dtype(self) -> str:
        """What is stored and computed unless told otherwise."""
        return "fp32" if self.release is None else "fp16"

    @property
    def is_lowered(self) -> bool:
        """Whether `export` has a lowering for it; a runner exists only where `runs_now`."""
        return self.runs_now or self.release is not None


_HALF = ("fp32", "fp16", "bf16")
_FP8 = (*_HALF, "fp8", "int8", "int4")
_FP4 = (*_FP8, "fp4")
_AMPERE = (*_HALF, "int8", "int4")
_SCATTER = "TensorScatter"

TARGETS: tuple[Target, ...] = (
    Target("cpu", "ONNX Runtime CPU", None, None, None, _HALF, "in place (bound buffer)",
           "the embedded default; fp16 and bf16 are storage, arithmetic is fp32", runs_now=True,
           stores=("fp8", "int8")),
    Target("cuda", "ONNX Runtime CUDA", None, None, None, _HALF, "in place (bound buffer)",
           "any NVIDIA GPU that onnxruntime-gpu supports"),
    Target("jetson-orin-jp6", "TensorRT 10.3", "8.7", 64, 204.8, ("fp32", "fp16", "int8", "int4"),
           "ScatterND or concat", "AGX Orin 64 GB, JetPack 6; opset 20; no fp8", "10.3"),
    Target("jetson-orin-jp7", "TensorRT 10.16", "8.7", 64, 204.8, ("fp32", "fp16", "int8", "int4"),
           _SCATTER, "AGX Orin 64 GB, JetPack 7.2; no fp8", "10.16"),
    Target("jetson-thor-jp71", "TensorRT 10.13", "11.0", 128, 273.0, _FP4,
           "ScatterND or concat", "AGX Thor T5000, JetPack 7.0 and 7.1; opset 20", "10.13"),
    Target("jetson-thor-jp7", "TensorRT 10.16", "11.0", 128, 273.0, _FP4, _SCATTER,
           "AGX Thor T5000, JetPack 7.2", "10.16"),
    Target("a100", "TensorRT 11", "8.0", 80, 2039.0, _AMPERE, _SCATTER, "SXM 80 GB", "11"),
    Target("h100", "TensorRT 11", "9.0", 80, 3350.0, _FP8, _SCATTER, "SXM 80 GB", "11"),
    Target("h200", "TensorRT 11", "9.0", 141, 4800.0, _FP8, _SCATTER, "SXM", "11"),
    Target("b200", "TensorRT 11", "10.0", 180, 7700.0, _FP4, _SCATTER, "HGX", "11"),
    Target("rtx-30", "TensorRT-RTX 1.7", "8.6", None, None, _AMPERE, _SCATTER,
           "engines build with no GPU", "rtx-1.7"),
    Target("rtx-40", "TensorRT-RTX 1.7", "8.9", 24, 1008.0, _FP8, _SCATTER, "RTX 4090", "rtx-1.7"),
    Target("rtx-50", "TensorRT-RTX 1.7", "12.0", 32, 1792.0, _FP4, _SCATTER, "RTX 5090", "rtx-1.7"),
    Target("dgx-spark", "TensorRT-RTX 1.7", "12.1", 128, 273.0, _FP4, _SCATTER,
           "memory shared with the CPU", "rtx-1.7"),
)  # fmt: skip

DEFAULT_TARGET = "cpu"


def find_target(name: str) -> Target:
    """The target of that name. Raises InputError TARGET-UNKNOWN, which lists the known ones."""
    for target in TARGETS:
        if target.name == name:
            return target
    known = ", ".join(target.name for target in TARGETS)
    raise InputError(
        "TARGET-UNKNOWN",
        f"no target is named {quoted(name)}; wanted one of {known}",
        hint="`mla-deploy export --target cpu` runs on any machine",
        target=name,
    )


def buildable_target(name: str) -> Target:
    """The target, if this release can export for it.

    Raises InputError TARGET-UNKNOWN, TARGET-NOT-BUILT (known, but planned for a later release).
    """
    target = find_target(name)
    if target.is_lowered:
        return target
    ready = ", ".join(entry.name for entry in TARGETS if entry.is_lowered)
    raise InputError(
        "TARGET-NOT-BUILT",
        f"this release has no lowering for {target.name} ({target.runtime}) yet; built are {ready}",
        hint="export with `--target cpu`; a later release adds this target",
        target=name,
    )


def check_stored(target: Target, dtype: str) -> None:
    """Raises InputError TARGET-DTYPE when the target cannot keep weights in `dtype`."""
    known = tuple(dict.fromkeys((*target.dtypes, *target.stores)))
    if dtype not in known:
        raise InputError(
            "TARGET-DTYPE",
            f"target {target.name} cannot keep weights that are {quoted(dtype)}; wanted one of "
            f"{', '.join(known)}",
            hint="leave --weights out: the weights are then stored in --dtype",
            target=target.name,
            dtype=dtype,
        )


def check_dtype(target: Target, dtype: str) -> None:
    """Raises InputError TARGET-DTYPE when the target cannot hold weights and cache in `dtype`."""
    if dtype not in target.dtypes:
        raise InputError(
            "TARGET-DTYPE",
            f"target {target.name} has no dtype {quoted(dtype)}; wanted one of "
            f"{', '.join(target.dtypes)}",
            hint="leave --dtype out to keep the target's default",
            target=target.name,
            dtype=dtype,
        )
