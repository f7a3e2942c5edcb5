"""The Triton kernels: numbers in Triton's interpreter, and machine code for every SM."""

from __future__ import annotations

import importlib.util
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plugins.mla_decode.reference import TOLERANCE, Problem, Shape, expected, problem, same_bytes

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton, and found none", allow_module_level=True)

from plugins.mla_decode import aot

ROOT = Path(__file__).parents[2]
# The interpreter cuts fp32 to bf16 where a device rounds it: a whole unit instead of a half.
INTERPRETED = {"fp16": TOLERANCE["fp16"], "bf16": 2 * TOLERANCE["bf16"]}

# (shape, (cached, new) of each row, dtype, storage, splits)
Case = tuple[Shape, list[tuple[int, int]], str, str, int]
CASES: dict[str, Case] = {
    "from 0 and 1, full, idle": (
        Shape(heads=5, capacity=64), [(0, 1), (1, 1), (63, 1), (40, 1), (7, 0), (0, 0)],
        "fp16", "plain", 2,
    ),
    "ragged, bf16": (
        Shape(heads=5, new=3, capacity=96), [(93, 3), (40, 2), (0, 3)], "bf16", "plain", 3
    ),
    "rank 256, rope 32": (
        Shape(heads=5, latent=256, rope=32, new=2, capacity=64), [(50, 2), (0, 1)],
        "fp16", "plain", 1,
    ),
    "rank 256, rope 64, bf16": (
        Shape(heads=5, latent=256, rope=64, capacity=64), [(50, 1), (1, 1)], "bf16", "plain", 1
    ),
    "rank 512, rope 32, int8": (
        Shape(heads=5, latent=512, rope=32, new=2, capacity=64), [(50, 2), (0, 1)],
        "fp16", "int8", 2,
    ),
    "no rope key": (
        Shape(heads=5, latent=64, rope=0, capacity=64), [(50, 1), (0, 1)], "fp16", "plain", 1
    ),
    "128 heads": (Shape(heads=128, capacity=64), [(60, 1)], "fp16", "plain", 2),
    "int8, ragged": (
        Shape(heads=5, new=2, capacity=96), [(93, 2), (1, 1), (0, 2), (5, 0)], "fp16", "int8", 3
    ),
    "int8, bf16": (Shape(heads=5, capacity=64), [(50, 1), (0, 1)], "bf16", "int8", 1),
    "fp8, ragged": (
        Shape(heads=5, new=2, capacity=96), [(93, 2), (1, 1), (0, 2), (5, 0)], "fp16", "fp8", 3
    ),
    "fp8, bf16": (Shape(heads=5, capacity=64), [(50, 1), (0, 1)], "bf16", "fp8", 1),
}  # fmt: skip
LONG: dict[str, Case] = {
    f"128 heads, {storage}, {dtype}": (
        Shape(heads=128, new=2, capacity=512),
        [(510, 2), (200, 1)],
        dtype,
        storage,
        4,
    )
    for storage in ("plain", "int8", "fp8")
    for dtype in ("fp16", "bf16")
}
Result = tuple[Any, Any, Any]


def interpreted(cases: dict[str, Case]) -> dict[str, tuple[Problem, Result]]:
    """Every case in one process that interprets."""
    calls = {
        name: problem(shape, lengths, dtype=dtype, storage=storage)
        for name, (shape, lengths, dtype, storage, _) in cases.items()
    }
    jobs = [(calls[name], case[-1]) for name, case in cases.items()]
    done = subprocess.run(
        [sys.executable, "-m", "tests.plugins.triton_worker"], input=pickle.dumps(jobs), cwd=ROOT,
        capture_output=True, check=False, env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:].decode()
    results = pickle.loads(done.stdout)
    return {name: (calls[name], result) for name, result in zip(cases, results, strict=True)}


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[Problem, Result]]:
    return interpreted(CASES)


def check(call: Problem, result: Result, dtype: str) -> None:
    out, cache, scales = result
    wanted, cache_wanted, scales_wanted = expected(call)
    assert np.abs(out - wanted).max() < INTERPRETED[dtype]
    assert cache.tobytes() == cache_wanted.tobytes()
    assert scales is None or same_bytes(scales, scales_wanted)


@pytest.mark.parametrize("name", CASES)
def test_numbers(found: dict[str, tuple[Problem, Result]], name: str) -> None:
    """Slots never written hold NaN (coded: any byte, NaN scales), and so do padding and scratch."""
    call, result = found[name]
    check(call, result, CASES[name][2])


@pytest.mark.heavy
def test_numbers_of_longer_calls() -> None:
    for name, (call, result) in interpreted(LONG).items():
        check(call, result, LONG[name][2])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
        yield


def spilled(report: str) -> list[str]:
    return [n for n in re.findall(r"(\d+) bytes spill", report) if n != "0"]


@pytest.mark.parametrize("step", aot.STEPS)
def test_jetpack_6_gets_ptx_that_its_driver_reads(step: str) -> None:
    kernel = aot.compile_kernel(step, aot.Variant(), 87)
    assert re.findall(r"^\.(version|target) (\S+)", kernel.ptx, re.MULTILINE) == [
        ("version", "8.5"), ("target", "sm_87")
    ]  # fmt: skip
    assert kernel.cubin.startswith(b"\x7fELF") and spilled(kernel.report) == []


# Pointers and int32 numbers as TensorRT passes them: inputs, numbers, outputs, nothing behind.
ARGUMENTS = {
    ("append", "plain"): "new_row cache cached fresh | new_tokens capacity | cache",
    ("append", "int8"): "new_row cache scales cached fresh | new_tokens capacity | cache scales",
    ("attend", "plain"): "query cache cached fresh | new heads capacity splits | partial log_sum",
    ("attend", "fp8"): "query cache scales cached fresh | new heads capacity splits | partial log",
    ("join", "plain"): "partial log_sum | splits | out",
}


@pytest.mark.parametrize(("step", "storage"), ARGUMENTS)
def test_the_arguments_are_those_that_tensorrt_passes(step: str, storage: str) -> None:
    kernel = aot.compile_kernel(step, aot.Variant(storage=storage, tile=128), 90)
    entry = re.search(r"\.visible \.entry \w+\((.*?)\n\)", kernel.ptx, re.DOTALL)
    assert entry is not None
    kinds = ["number" if ".b32" in part or ".u32" in part else "pointer"
             for part in entry[1].split(",\n")]  # fmt: skip
    parts = [part.split() for part in ARGUMENTS[step, storage].split("|")]
    assert kinds == [
        *["pointer"] * len(parts[0]), *["number"] * len(parts[1]), *["pointer"] * len(parts[2])
    ]  # fmt: skip


PTX = """.version 8.5
.target sm_87
.visible .entry k(
	.param .u64 k_param_0,
	.param .u64 k_param_1,
	.param .u64 k_param_2
)
{
	ld.param.u64 %rd1, [k_param_0];READ
	ret;
}
"""


def test_scratch_parameters_are_dropped_only_where_nothing_reads_them() -> None:
    dropped = aot.without_scratch(PTX.replace("READ", ""), "k")
    assert "k_param_0\n)" in dropped and "k_param_1" not in dropped
    with pytest.raises(ValueError, match="reads its parameter k_param_2"):
        aot.without_scratch(PTX.replace("READ", "\n\tld.param.u64 %rd2, [k_param_2];"), "k")
    with pytest.raises(ValueError, match="no entry other"):
        aot.without_scratch(PTX, "other")
    with pytest.raises(ValueError, match="ptxas refuses"):
        aot.assembled(PTX.replace("READ", "\n\tnot.an.instruction;"), 87)


def test_what_has_no_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="powers of two"):
        aot.Variant(latent=384, tile=384)
    with pytest.raises(ValueError, match="int8 rows would spill"):
        aot.Variant(storage="int8", rows=32)
    with pytest.raises(ValueError, match="int4"):
        aot.Variant(storage="int4")


@pytest.mark.heavy
@pytest.mark.parametrize("storage", ["plain", "int8", "fp8"])
def test_every_sm(tmp_path: Path, storage: str) -> None:
    """Machine code of every kernel for every SM, without a spilled register."""
    variant = aot.Variant(dtype="bf16", storage=storage, tile=128)
    rows = aot.write(tmp_path / "out", variant, aot.SMS)
    assert len(rows) == len(aot.SMS) * len(aot.STEPS)
    for row in rows:
        cubin = (tmp_path / "out" / row["cubin"]).read_bytes()
        assert cubin.startswith(b"\x7fELF")
        assert row["shared_bytes"] <= 99 * 1024, row
    for sm in aot.SMS:
        assert spilled(aot.compile_kernel("attend", variant, sm).report) == []
