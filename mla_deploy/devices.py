"""Devices that `plan` knows, as data: memory, bandwidth, peak arithmetic, and the export target.

Vendor figures for the part named in `source`; none is measured here. `tflops` is dense, without
structured sparsity, and products summed in fp32 where the vendor tells two rates. Vendors publish a
Jetson's rate as sparse INT8 (Thor, Spark: sparse FP4) alone; the others follow from it: dense is
half of sparse, and each halving of the bits doubles the rate. Memory is GiB as sold.
`reserved_gib` is assumed: what the system and other programs hold of a pool that a CPU shares; on a
card what its driver and error correction keep. `plan` takes another with `--reserve`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mla_deploy import machine
from mla_deploy.errors import InputError, quoted
from mla_deploy.targets import Target, find_target


@dataclass(frozen=True)
class Device:
    """One part. `target` is the row of `targets.py` that a bundle for it is exported for.

    `bandwidth_gb_s` and `tflops` (by dtype of the products) are empty where nobody publishes them.
    """

    name: str
    title: str
    target: str
    memory_gib: float
    bandwidth_gb_s: float | None
    tflops: Mapping[str, float]
    is_unified: bool
    reserved_gib: float
    source: str

    @property
    def row(self) -> Target:
        return find_target(self.target)


def _rates(fp16: float, *, fp8: bool = False, fp4: bool = False) -> dict[str, float]:
    """Of a line whose rate doubles with each halving of the bits."""
    rates = {"fp16": fp16, "bf16": fp16, "int8": 2 * fp16}
    return {**rates, **({"fp8": 2 * fp16} if fp8 else {}), **({"fp4": 4 * fp16} if fp4 else {})}


_GIB = 1 << 30
_ORIN = "jetson-orin-jp7"
_JETSON_GIB, _NANO_GIB, _SPARK_GIB = 2.5, 1.75, 4.0
_CARD_GIB, _SERVER_GIB = 0.75, 1.5
_ORIN_SHEET = "NVIDIA Jetson Orin Nano, NX and AGX Orin module data sheets"

DEVICES: tuple[Device, ...] = (
    Device("orin-nano-8", "Jetson Orin Nano 8 GB (Super)", _ORIN, 8, 102.0, _rates(16.75), True,
           _NANO_GIB, f"{_ORIN_SHEET}, 67 sparse INT8 TOPS; before JetPack 6.2 40, at 68 GB/s"),
    Device("orin-nx-16", "Jetson Orin NX 16 GB", _ORIN, 16, 102.4, _rates(15.0), True, _JETSON_GIB,
           f"{_ORIN_SHEET}, GPU alone: 60 sparse INT8 TOPS; Super modes are faster"),
    Device("agx-orin-32", "Jetson AGX Orin 32 GB", _ORIN, 32, 204.8, _rates(27.0), True,
           _JETSON_GIB, f"{_ORIN_SHEET}, GPU alone: 108 sparse INT8 TOPS"),
    Device("agx-orin-64", "Jetson AGX Orin 64 GB", _ORIN, 64, 204.8, _rates(42.5), True,
           _JETSON_GIB, f"{_ORIN_SHEET}, GPU alone: 170 sparse INT8 TOPS"),
    Device("thor-128", "Jetson AGX Thor T5000 128 GB", "jetson-thor-jp7", 128, 273.0,
           _rates(258.75, fp8=True, fp4=True), True, _JETSON_GIB,
           "NVIDIA Jetson Thor data sheet, 2070 sparse FP4 TFLOPS"),
    Device("dgx-spark", "DGX Spark 128 GB", "dgx-spark", 128, 273.0,
           _rates(125.0, fp8=True, fp4=True), True, _SPARK_GIB,
           "NVIDIA DGX Spark data sheet, 1000 sparse FP4 TFLOPS"),
    Device("rtx-4090", "GeForce RTX 4090", "rtx-40", 24, 1008.0,
           {"fp16": 165.2, "bf16": 165.2, "fp8": 330.3, "int8": 660.6}, False, _CARD_GIB,
           "NVIDIA Ada architecture paper"),
    Device("rtx-5090", "GeForce RTX 5090", "rtx-50", 32, 1792.0,
           {"fp16": 209.5, "bf16": 209.5, "fp8": 419.0, "int8": 838.0, "fp4": 1676.0}, False,
           _CARD_GIB, "NVIDIA RTX Blackwell architecture paper"),
    Device("l4", "L4", "rtx-40", 24, 300.0, _rates(121.0, fp8=True), False, 2.0,
           "NVIDIA L4 data sheet (sparse figures halved); no target of its own, taken as rtx-40"),
    Device("l40s", "L40S", "rtx-40", 48, 864.0, _rates(362.0, fp8=True), False, 3.5,
           "NVIDIA L40S data sheet (sparse figures halved); no target of its own, taken as rtx-40"),
    Device("a100-40", "A100 SXM 40 GB", "a100", 40, 1555.0, _rates(312.0), False, _SERVER_GIB,
           "NVIDIA A100 data sheet"),
    Device("a100-80", "A100 SXM 80 GB", "a100", 80, 2039.0, _rates(312.0), False, _SERVER_GIB,
           "NVIDIA A100 data sheet"),
    Device("h100", "H100 SXM 80 GB", "h100", 80, 3350.0, _rates(989.5, fp8=True), False,
           _SERVER_GIB, "NVIDIA H100 data sheet (sparse figures halved)"),
    Device("h200", "H200 SXM 141 GB", "h200", 141, 4800.0, _rates(989.5, fp8=True), False,
           _SERVER_GIB, "NVIDIA H200 data sheet (sparse figures halved)"),
    Device("b200", "B200 (HGX) 180 GB", "b200", 180, 7700.0, _rates(2250.0, fp8=True, fp4=True),
           False, _SERVER_GIB, "NVIDIA HGX B200 data sheet (sparse figures halved), 1000 W"),
)  # fmt: skip


def find_device(name: str) -> Device:
    """The device of that name. Raises: InputError PLAN-DEVICE, with the nearest names."""
    for device in DEVICES:
        if device.name == name:
            return device
    near = nearest(name, (device.name for device in DEVICES))
    raise InputError(
        "PLAN-DEVICE",
        f"no device is named {quoted(name)}; wanted {near}",
        hint="`mla-deploy plan --list` shows devices and models; `--device all` takes every device",
        device=name,
    )


def this_machine() -> Device:
    """The machine at hand, with ONNX Runtime on its CPU; what is not free is reserved."""
    facts = machine.memory_bytes()
    total, free = facts or (0, 0)
    return Device("cpu", "this machine's CPU", "cpu", total / _GIB, None, {}, True,
                  (total - free) / _GIB, "what the system tells; no figures of speed")  # fmt: skip


def nearest(name: str, names: Iterable[str]) -> str:
    """`a, b or c`: the names most like `name`, or all of them where none is."""
    known = list(names)
    lowered = name.lower().replace("_", "-").replace(" ", "-")
    near = difflib.get_close_matches(lowered, known, n=4, cutoff=0.5)
    near += [other for other in known if lowered and lowered in other and other not in near]
    found = near or known
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} or {found[-1]}"
