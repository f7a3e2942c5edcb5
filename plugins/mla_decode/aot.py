"""The Triton kernels compiled ahead of time, with no GPU: PTX and machine code for each SM.

    python -m plugins.mla_decode.aot --out DIR [--sm 87 ...] [--dtype fp16] [--storage plain] ...

Each kernel becomes NAME.smXX.ptx and .cubin; index.json says how it is launched.

Triton gives every kernel two more pointers, for scratch that none of these uses. TensorRT passes
what a plugin names and nothing else, so they are taken out of the PTX, which is then assembled
again. A PTX that reads them, or a kernel that has such scratch, is refused.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import triton_kernels as kernels

SMS = (80, 86, 87, 89, 90, 100, 110, 120, 121)
# JetPack 6 (CUDA 12.6) reads PTX up to 8.5, and has SM 8.7 only.
PTX_VERSIONS = {87: 85}
_NEW_ASSEMBLER = 90  # from this SM on, Triton writes PTX for its second assembler
_SCRATCH = 2
_ATTEND_WARPS = 8  # four do not hold 16 rows of 512 sums without spilling


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for. L, R and the tiles are powers of two; R may be 0."""

    dtype: str = "fp16"  # of query, new rows and output: fp16 or bf16
    storage: str = "plain"  # of the cache: plain, int8 or fp8
    latent: int = 512
    rope: int = 64
    tile: int = 512
    rope_tile: int = 32
    scale: float = 192**-0.5
    rows: int = 16  # query rows of a block: 16, or 32 where S * H is more and rows are plain

    def __post_init__(self) -> None:
        whole = (self.latent, self.tile, self.rope_tile, *((self.rope,) if self.rope else ()))
        if any(size < 1 or size & (size - 1) for size in whole):
            raise ValueError(f"found widths {whole}, wanted powers of two")
        if self.dtype not in ("fp16", "bf16") or self.storage not in kernels.STORAGES:
            raise ValueError(f"found {self.dtype} and {self.storage}")
        if self.rows not in ((16, 32) if self.storage == "plain" else (16,)):
            raise ValueError(
                f"found {self.rows} rows a block, which {self.storage} rows would spill"
            )

    def layout(self) -> dict[str, int]:
        return {"L": self.latent, "R": self.rope, "TILE": self.tile, "ROPE_TILE": self.rope_tile,
                "STORAGE": kernels.STORAGES.index(self.storage)}  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel, its scratch parameters gone. `shared_bytes` is asked for at launch."""

    name: str
    sm: int
    threads: int
    shared_bytes: int
    ptx: str
    cubin: bytes
    report: str  # ptxas -v


def signature(step: str, variant: Variant) -> tuple[dict[str, str], dict[str, Any]]:
    """Types of the arguments of `append`, `attend` or `join`, and the constants among them."""
    wide, coded = f"*{variant.dtype}", variant.storage != "plain"
    held = {"int8": "*i8", "fp8": "*u8"}.get(variant.storage, wide)
    scales: dict[str, str] = {"scales": "*fp32"} if coded else {"scales": "constexpr"}
    lengths = {"cache_lengths": "*i64", "new_lengths": "*i64"}
    none: dict[str, Any] = {} if coded else {"scales": None}
    if step == "append":
        kinds = {"new_row": wide, "cache": held, **scales, **lengths, "new_tokens": "i32",
                 "capacity": "i32", "cache_out": held}  # fmt: skip
        kinds["scales_out"] = "*fp32" if coded else "constexpr"
        return kinds, {**none, **({} if coded else {"scales_out": None}), **variant.layout()}
    if step == "attend":
        numbers = dict.fromkeys(("new_tokens", "heads", "capacity", "splits"), "i32")
        kinds = {"query": wide, "cache": held, **scales, **lengths, **numbers, "partial": "*fp32",
                 "log_sum": "*fp32"}  # fmt: skip
        fixed = {"SCALE": variant.scale, "ROWS": variant.rows, "TOKENS": kernels.TOKENS}
        return kinds, {**none, **variant.layout(), **fixed, "WIDE": False}
    kinds = {"partial": "*fp32", "log_sum": "*fp32", "splits": "i32", "out": wide}
    return kinds, {"L": variant.latent}


_FUNCTIONS = {
    "append": kernels.append_row, "attend": kernels.attend_split, "join": kernels.join_splits
}  # fmt: skip
STEPS = tuple(_FUNCTIONS)


def compile_kernel(step: str, variant: Variant, sm: int) -> Kernel:
    """Raises: ValueError when the kernel has scratch, or its PTX reads a parameter of it."""
    kinds, constants = signature(step, variant)
    kinds = {**kinds, **dict.fromkeys(constants, "constexpr")}
    options: dict[str, Any] = {"enable_fp_fusion": True}
    options["num_warps"] = _ATTEND_WARPS if step == "attend" else 4
    if step == "attend":
        options["num_stages"] = 2
    if sm in PTX_VERSIONS:
        options["ptx_version"] = PTX_VERSIONS[sm]
    source = ASTSource(fn=_FUNCTIONS[step], signature=kinds, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    facts = made.metadata
    if facts.global_scratch_size or facts.profile_scratch_size:
        raise ValueError(f"{facts.name} wants scratch, which TensorRT does not give")
    ptx = without_scratch(made.asm["ptx"], facts.name)
    cubin, report = assembled(ptx, sm)
    return Kernel(facts.name, sm, 32 * facts.num_warps, facts.shared, ptx, cubin, report)


def without_scratch(ptx: str, name: str) -> str:
    """The PTX without the last two parameters of an entry. Raises: ValueError if it reads one."""
    entry = re.search(rf"\.visible \.entry {re.escape(name)}\(\s*(.*?)\n\)", ptx, re.DOTALL)
    parameters = [] if entry is None else [part.strip() for part in entry[1].split(",\n")]
    if entry is None or len(parameters) <= _SCRATCH:
        raise ValueError(f"no entry {name} with more than {_SCRATCH} parameters")
    for dropped in parameters[-_SCRATCH:]:
        word = dropped.split()[-1]
        if len(re.findall(rf"\b{re.escape(word)}\b", ptx)) != 1:
            raise ValueError(f"{name} reads its parameter {word}")
    kept = ",\n\t".join(parameters[:-_SCRATCH])
    return ptx[: entry.start(1)] + kept + ptx[entry.end(1) :]


def assembled(ptx: str, sm: int) -> tuple[bytes, str]:
    """Machine code, and what ptxas says of its registers, by the assembler that Triton brings."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tool = folder / ("ptxas-blackwell" if sm >= _NEW_ASSEMBLER else "ptxas")
    found = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    if found is None:
        raise ValueError("the PTX names no target")
    with tempfile.TemporaryDirectory() as place:
        source, result = Path(place) / "kernel.ptx", Path(place) / "kernel.cubin"
        source.write_text(ptx, encoding="utf-8")
        command = [str(tool), "-v", f"-arch={found[1]}", str(source), "-o", str(result)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ValueError(f"ptxas refuses the PTX: {done.stderr.strip()[:500]}")
        return result.read_bytes(), done.stderr


def write(out: Path, variant: Variant, sms: Sequence[int]) -> list[dict[str, Any]]:
    """Compile every step for every SM into `out`; what index.json says."""
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for sm in sms:
        for step in STEPS:
            kernel = compile_kernel(step, variant, sm)
            stem = f"{kernel.name}.sm{sm}"
            (out / f"{stem}.ptx").write_text(kernel.ptx, encoding="utf-8")
            (out / f"{stem}.cubin").write_bytes(kernel.cubin)
            rows.append({"step": step, "entry": kernel.name, "sm": sm, "ptx": f"{stem}.ptx",
                         "cubin": f"{stem}.cubin", "threads": kernel.threads,
                         "shared_bytes": kernel.shared_bytes})  # fmt: skip
    index = {"variant": asdict(variant), "triton": triton.__version__, "kernels": rows}
    (out / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="compile the Triton kernels; no GPU is needed")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sm", type=int, nargs="+", default=list(SMS), choices=SMS)
    for name, value in asdict(Variant()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args())
    out, sms = given.pop("out"), given.pop("sm")
    for row in write(out, Variant(**given), sms):
        print(row["cubin"], row["threads"], "threads", row["shared_bytes"], "bytes shared")


if __name__ == "__main__":
    main()
