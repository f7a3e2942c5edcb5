"""What this machine can do: libraries, runtimes, GPU, processor, memory, disk.

Every probe answers, whatever it finds: a library is imported in a child process with a time limit,
because a broken native library may abort the process that loads it. Nothing here raises.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

State = Literal["ok", "absent", "broken"]

_IMPORT_SECONDS = 60
_PR_SET_PDEATHSIG = 1
_LIBRARIES = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime",
              "safetensors", "tokenizers", "numpy")  # fmt: skip
_ENGINES = ("tensorrt_rtx", "tensorrt")
_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd",
          "bf16", "i8mm")  # fmt: skip

_MEANING = {
    "library": "mla-deploy needs it: install the package again in this environment",
    "tensorrt_rtx": "no TensorRT-RTX engines: `pip install 'mla-deploy[tensorrt]'`",
    "tensorrt": "no TensorRT engines; it comes with JetPack or NVIDIA's own packages",
    "no CUDA": "ONNX Runtime has no CUDA provider: bundles run on the CPU",
    "CUDA without GPU": "compiled in, but without a GPU only CPU runs",
    "GPU": "no NVIDIA GPU seen: the cpu target is what runs here",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report: `what` was looked for, its `state`, what was found, what it means."""

    what: str
    state: State
    found: str
    meaning: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine_machine(
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Finding, ...]:
    """Every finding, libraries first. Some seconds: each library is really imported."""
    names = (*_LIBRARIES, *_ENGINES)
    imports: dict[str, Finding] = {}
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        for name, finding in zip(names, pool.map(_import_finding, names), strict=True):
            imports[name] = finding
            if progress is not None:
                progress("importing libraries", len(imports), len(names))
    from mla_deploy.jetson import jetson_probes

    gpu = _guarded("GPU", _gpu)
    providers = partial(_providers, imports["onnxruntime"], gpu)
    return (
        _guarded("python", _python),
        *imports.values(),
        _guarded("ONNX Runtime providers", providers),
        gpu,
        _guarded("processor", _processor),
        _guarded("memory", _memory),
        _guarded("swap", _swap),
        _guarded("disk", _disk),
        *(_guarded(what, probe) for what, probe in jetson_probes()),
    )


def _guarded(what: str, probe: Callable[[], Finding]) -> Finding:
    try:
        return probe()
    except Exception as problem:  # a report is never worth a crash
        return Finding(what, "broken", f"{type(problem).__name__}: {problem}"[:200])


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} at {sys.executable}")


_IMPORT = """
import importlib, json, sys
module = importlib.import_module(sys.argv[1])
facts = {"version": str(getattr(module, "__version__", "unknown"))}
if sys.argv[1] == "onnxruntime":
    facts["providers"] = module.get_available_providers()
if sys.argv[1] == "torch":
    facts["cuda"] = module.version.cuda
sys.stdout.write("\\n" + json.dumps(facts))
"""


def _import_finding(name: str) -> Finding:
    meaning = _MEANING.get(name, _MEANING["library"])
    try:
        child = subprocess.run(
            [sys.executable, "-c", _IMPORT, name],
            capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as problem:
        return Finding(name, "broken", f"{type(problem).__name__}"[:200], meaning)
    if child.returncode == 0:
        facts = json.loads(child.stdout.rpartition("\n")[2])
        return Finding(name, "ok", facts["version"], facts=facts)
    last = (child.stderr.strip().splitlines() or [f"ended with {child.returncode}"])[-1][:200]
    if f"No module named '{name}'" in last:
        return Finding(name, "absent", "not installed", meaning)
    return Finding(name, "broken", last, meaning)


def _providers(runtime: Finding, gpu: Finding) -> Finding:
    names = [str(name) for name in runtime.facts.get("providers", ())]
    what = "ONNX Runtime providers"
    if not names:
        return Finding(what, "absent", "none", _MEANING["library"])
    meaning = "" if "CUDAExecutionProvider" in names else _MEANING["no CUDA"]
    if not meaning and gpu.state != "ok":
        meaning = _MEANING["CUDA without GPU"]
    short = ", ".join(name.removesuffix("ExecutionProvider") for name in names)
    return Finding(what, "ok", short, meaning, {"providers": names})


def _gpu() -> Finding:
    if shutil.which("nvidia-smi") is None:
        driver = re.search(
            r"Kernel Module\s+(?:for \w+\s+)?([\d.]+)", _proc("driver/nvidia/version")
        )
        if driver is None:
            return Finding("GPU", "absent", "nvidia-smi not found", _MEANING["GPU"])
        found = f"NVIDIA driver {driver[1]}, no nvidia-smi to ask"
        return Finding("GPU", "ok", found, facts={"gpus": [], "driver": driver[1]})
    child = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total,driver_version",
         "--format=csv,noheader"],
        capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    rows = [line.strip() for line in child.stdout.splitlines() if line.strip()]
    if child.returncode != 0 or not rows:
        told = (child.stderr or child.stdout).strip()[:200]
        return Finding("GPU", "broken", told or "nvidia-smi failed", _MEANING["GPU"])
    return Finding("GPU", "ok", "; ".join(rows), facts={"gpus": rows})


def _processor() -> Finding:
    text = _proc("cpuinfo")
    fields = dict(_field(line) for line in text.splitlines() if ":" in line)
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    model = processor_name()
    known = [flag for flag in _FLAGS if flag in flags]
    cores = usable_cores()
    wide = {"avx2", "avx512f", "asimd"} & flags
    meaning = "" if wide or not text else "no wide vector instructions: expect slow steps"
    found = f"{model}, {cores} cores, {' '.join(known) or 'no known vector flags'}"
    return Finding("processor", "ok", found, meaning,
                   {"model": model, "cores": cores, "flags": known})  # fmt: skip


def _memory() -> Finding:
    fields = dict(_field(line) for line in _proc("meminfo").splitlines() if ":" in line)
    total, free = (int(fields[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    facts = {"total_bytes": total, "available_bytes": free}
    meaning = "" if free > 2**31 else "under 2 GiB free: exports may not fit"
    found = f"{free / 2**30:.1f} GiB available of {total / 2**30:.1f} GiB"
    return Finding("memory", "ok", found, meaning, facts)


def _swap() -> Finding:
    fields = dict(_field(line) for line in _proc("meminfo").splitlines() if ":" in line)
    total, free = (int(fields[key].split()[0]) * 1024 for key in ("SwapTotal", "SwapFree"))
    facts = {"total_bytes": total, "free_bytes": free}
    if total == 0:
        return Finding("swap", "absent", "none", "a build that runs out of memory is killed", facts)
    found = f"{free / 2**30:.1f} GiB free of {total / 2**30:.1f} GiB"
    return Finding("swap", "ok", found, "", facts)


def _disk() -> Finding:
    usage = shutil.disk_usage(os.curdir)
    found = f"{usage.free / 2**30:.1f} GiB free in the current folder"
    return Finding("disk", "ok", found, "", {"free_bytes": usage.free})


def gpu_rows() -> list[str]:
    """Name, compute capability, memory and driver of each GPU, as nvidia-smi tells them."""
    return list(_guarded("GPU", _gpu).facts.get("gpus", []))


def processor_name() -> str:
    """The processor's model, else its architecture."""
    fields = dict(_field(line) for line in _proc("cpuinfo").splitlines() if ":" in line)
    return fields.get("model name") or platform.processor() or platform.machine()


def usable_cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_bytes() -> int:
    """The most memory this process has held, in bytes; 0 where the system does not say."""
    fields = dict(_field(line) for line in _proc("self/status").splitlines() if ":" in line)
    return int(fields.get("VmHWM", "0 kB").split()[0]) * 1024


def resident_bytes() -> tuple[int, int]:
    """Bytes of this process in memory: all, and those that no file backs; 0 where unknown."""
    fields = dict(_field(line) for line in _proc("self/status").splitlines() if ":" in line)
    whole, private = (int(fields.get(name, "0 kB").split()[0]) for name in ("VmRSS", "RssAnon"))
    return whole * 1024, private * 1024


def die_with_parent() -> None:
    """Linux: a parent that is killed takes this process with it."""
    call = getattr(ctypes.CDLL(None), "prctl", None)
    if call is not None:
        call(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def available_bytes() -> int | None:
    """Bytes that can still be allocated, the container's limit included; None if unknown."""
    fields = dict(_field(line) for line in _proc("meminfo").splitlines() if ":" in line)
    if "MemAvailable" not in fields:
        return None
    free = int(fields["MemAvailable"].split()[0]) * 1024
    return min([free, *_container_bytes()])


def memory_bytes() -> tuple[int, int] | None:
    """(all, available) of this machine, the container's limit included in the second."""
    fields = dict(_field(line) for line in _proc("meminfo").splitlines() if ":" in line)
    free = available_bytes()
    if free is None or "MemTotal" not in fields:
        return None
    return int(fields["MemTotal"].split()[0]) * 1024, free


# Of control groups 2 and 1: the limit, what is used, and the files among that, which can be dropped
# (pages of mapped weights are such).
_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current",
     "/sys/fs/cgroup/memory.stat", ""),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes",
     "/sys/fs/cgroup/memory/memory.stat", "total_"),
)  # fmt: skip


def _container_bytes() -> Iterator[int]:
    """What the container may still take, where it has a limit."""
    for limit_file, used_file, stat_file, prefix in _GROUPS:
        limit, used = system_file(limit_file).strip(), system_file(used_file).strip()
        if limit.isdigit() and used.isdigit():
            lines = (line.split() for line in system_file(stat_file).splitlines())
            facts = {words[0]: int(words[1]) for words in lines if len(words) == 2}
            files = sum(facts.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
            yield max(int(limit) - max(int(used) - files, 0), 0)


def _field(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip(), value.strip()


def _proc(name: str) -> str:
    return system_file(f"/proc/{name}")


def system_file(path: str) -> str:
    """A file of the system: its own words, not untrusted input, so not through the door.

    "" where there is none.
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(1 << 20)
    except OSError:
        return ""
