"""What the compiled kernels take on each SM, and the bandwidth that they are up against.

    python -m plugins.mla_decode.resources [--write]

Compiles the CUDA and the Triton kernels for every SM (minutes; no GPU) and prints the tables of
README.md; with --write, puts them there. The roofline is arithmetic on `mla_deploy.targets`; what
a device took is in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mla_deploy.rewrite.mla_decode import MULTIPROCESSORS, blocks_of_a_wave
from mla_deploy.targets import TARGETS, Target

from . import aot

HERE = Path(__file__).parent
BEGIN, END = "<!-- tables: begin -->\n", "<!-- tables: end -->\n"
LATENT, ROPE, HEADS = 512, 64, 16
_ROW = LATENT + ROPE
# (name, storage, query rows of a block) of the kernel that does the work.
ATTEND = tuple((f"{s} {r}", s, r) for s in ("plain", "int8", "fp8") for r in (16, 32))
_CODINGS = {"Plain": "plain", "Int8": "int8", "Fp8": "fp8"}


@dataclass(frozen=True)
class Used:
    """Of one kernel on one SM. The worse of fp16 and bf16 where both were compiled."""

    registers: int
    spilled_bytes: int

    def __str__(self) -> str:
        tail = f" ({self.spilled_bytes} spilled)" if self.spilled_bytes else ""
        return f"{self.registers}{tail}"

    def worse(self, other: Used) -> Used:
        return Used(
            max(self.registers, other.registers), max(self.spilled_bytes, other.spilled_bytes)
        )


Table = dict[int, dict[str, Used]]  # by SM, by kernel


def cuda_table() -> Table:
    """All kernels of src/launch.cu for every SM, in one call of nvcc."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    codes = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in aot.SMS]
    with tempfile.TemporaryDirectory() as folder:
        source, result = HERE / "src" / "launch.cu", Path(folder) / "kernels.fatbin"
        command = [nvcc, "-std=c++17", "-O3", "-fatbin", *codes, "-Xptxas", "-v"]
        command += [str(source), "-o", str(result)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    table: Table = {sm: {} for sm in aot.SMS}
    for sm, name, used in _reported(done.stderr + done.stdout):
        table[sm][name] = used.worse(table[sm].get(name, used))
    return table


def _reported(text: str) -> Iterator[tuple[int, str, Used]]:
    """(SM, kernel, what it takes) of ptxas's report."""
    entries = re.split(r"Compiling entry function '", text)[1:]
    for entry in entries:
        head = re.match(r"(\w+)' for 'sm_(\d+)'", entry)
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        if head is None or spilled is None or registers is None:
            raise ValueError(f"ptxas reports in another form: {entry[:200]}")
        used = Used(int(registers[1]), int(spilled[1]) + int(spilled[2]))
        yield int(head[2]), _kernel_name(head[1]), used


def _kernel_name(mangled: str) -> str:
    """`attend_kernel<__half, Int8, 16>` -> `int8 16`; the others by their step."""
    step = re.search(r"(append|attend|join)_kernel", mangled)
    coding = re.search(r"\d(Plain|Int8|Fp8)", mangled)
    rows = re.search(r"Li(\d+)E", mangled)
    if step is None:
        raise ValueError(f"no kernel of ours: {mangled}")
    if step[1] != "attend" or coding is None or rows is None:
        return step[1]
    return f"{_CODINGS[coding[1]]} {rows[1]}"


def triton_table() -> tuple[Table, dict[str, int]]:
    """The Triton kernels for every SM, and their shared memory (the most of any SM)."""
    table: Table = {}
    shared: dict[str, int] = {}
    for sm in aot.SMS:
        table[sm] = {}
        jobs = [(n, "attend", aot.Variant(storage=s, rows=r, tile=128)) for n, s, r in ATTEND
                if r == 16 or s == "plain"]  # fmt: skip
        jobs += [(step, step, aot.Variant()) for step in ("append", "join")]
        for name, step, variant in jobs:
            kernel = aot.compile_kernel(step, variant, sm)
            registers = re.search(r"Used (\d+) registers", kernel.report)
            spilled = re.findall(r"(\d+) bytes spill", kernel.report)
            if registers is None:
                raise ValueError(f"ptxas reports in another form: {kernel.report[:200]}")
            table[sm][name] = Used(int(registers[1]), sum(map(int, spilled)))
            shared[name] = max(shared.get(name, 0), kernel.shared_bytes)
    return table, shared


def shared_bytes(storage: str, rows: int) -> int:
    """What a CUDA block asks for: `Shared` of src/tile.h, written once more in bytes."""
    tokens, pad = 32, 8
    wide = 2 * tokens * (_ROW + pad)
    if storage == "plain":
        stages = 2 * wide
    else:
        scales = (LATENT // 128 + ROPE // 32) * 4 * tokens
        stages = wide + 2 * (tokens * (_ROW + 16) + scales)
    return stages + 4 * rows * (tokens + 4) * 4 + 2 * rows * (tokens + pad) + 3 * 4 * rows


def resource_lines(table: Table, shared: dict[str, int]) -> list[str]:
    names = [name for name in (*(n for n, _, _ in ATTEND), "append", "join") if name in table[80]]
    lines = ["| SM | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for sm, used in table.items():
        cells = " | ".join(str(used[name]) for name in names)
        lines.append(f"| {sm // 10}.{sm % 10} | {cells} |")
    cells = " | ".join(f"{shared.get(name, 0) / 1024:.1f}" for name in names)
    lines.append(f"| shared KiB | {cells} |")
    return lines


def roofline_lines() -> list[str]:
    """Microseconds for one row, one layer, one new token: bytes over the target's bandwidth."""
    head = "| target | SM | GB/s | 4k plain | 4k 8-bit | 32k plain | 32k 8-bit | scratch at 32k |"
    lines = [head, "| --- |" * 1 + " --- |" * 7]
    for target in TARGETS:
        if target.sm is None or target.bandwidth_gb_s is None or target.sm not in MULTIPROCESSORS:
            continue
        times = [_microseconds(target, tokens, coded) for tokens in (4096, 32768)
                 for coded in (False, True)]  # fmt: skip
        share = _scratch_bytes(target, 32768) / _cache_bytes(32768, False)
        cells = " | ".join(f"{t:.1f}" for t in times)
        lines.append(
            f"| {target.name} | {target.sm} | {target.bandwidth_gb_s:.0f} | {cells} | {share:.0%} |"
        )
    return lines


def _cache_bytes(tokens: int, coded: bool) -> int:
    """A row of L + R halves, or of bytes with 4 + 2 scales."""
    return tokens * (_ROW + 4 * (LATENT // 128 + ROPE // 32) if coded else 2 * _ROW)


def _scratch_bytes(target: Target, tokens: int) -> int:
    """Partials and their sums, written and read, at one wave of splits of 64 tokens or more."""
    splits = min(blocks_of_a_wave(str(target.sm)), -(-tokens // 64))
    return 2 * splits * HEADS * (LATENT + 1) * 4


def _microseconds(target: Target, tokens: int, coded: bool) -> float:
    moved = _cache_bytes(tokens, coded) + _scratch_bytes(target, tokens)
    return moved / (float(target.bandwidth_gb_s or 0) * 1e3)


def versions() -> str:
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V([\d.]+)", told)
    return f"nvcc {found[1] if found else '?'}, Triton {aot.triton.__version__}"


def tables() -> str:
    """The part of README.md between its marks."""
    cuda_shared = {name: shared_bytes(storage, rows) for name, storage, rows in ATTEND}
    triton, triton_shared = triton_table()
    lines = [
        f"Registers per thread, by {versions()}: attention by storage and query rows of a block,",
        "then the two small kernels; the worse of fp16 and bf16 for CUDA, fp16 for Triton. Spilled",
        "bytes would stand behind. Shared memory is for L 512, R 64 and tiles of 128 and 32.", "",
        "CUDA:", "", *resource_lines(cuda_table(), cuda_shared), "",
        "Triton:", "", *resource_lines(triton, triton_shared), "",
        f"Roofline, computed: microseconds to move what one row of one layer needs (H {HEADS}, L",
        f"{LATENT}, R {ROPE}, one new token) at the target's full bandwidth, scratch included:", "",
        *roofline_lines(),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="registers, shared memory, spills, roofline")
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    write = parser.parse_args().write
    made = tables()
    print(made, end="")
    if write:
        path = HERE / "README.md"
        text = path.read_text(encoding="utf-8")
        before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
        path.write_text(before + made + after, encoding="utf-8")


if __name__ == "__main__":
    main()
