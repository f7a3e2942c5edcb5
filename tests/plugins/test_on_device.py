"""MlaDecode on this machine's GPU; and, without one, all of it that needs none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plugins.mla_decode import on_device
from plugins.mla_decode.device_calls import Built, CompiledTriton, PluginCall, built_for
from plugins.mla_decode.reference import Shape, problem
from tests.plugins.conftest import toolkit

ROOT = Path(__file__).parents[2]
REPORTS = sorted((ROOT / "docs" / "device-reports" / "mla_decode").glob("*.json"))


class NoGpu:
    """Memory and a stream where there is neither: addresses are numbers, nothing is read."""

    stream = 0

    def __init__(self) -> None:
        self.held: dict[int, int] = {}

    def allocate(self, count: int) -> int:
        self.held[len(self.held) + 1] = count
        return len(self.held)

    def free(self, address: int) -> None:
        del self.held[address]

    def to_device(self, address: int, array: Any) -> None:
        assert array.nbytes <= max(self.held[address], 1)


def put(built: Built, call: Any, blocks: int = 132) -> PluginCall:
    with on_device.Memory(NoGpu()) as memory:  # type: ignore[arg-type]
        return PluginCall(built, memory, call, "fp16", blocks)


def test_the_built_plugin_is_asked_for_its_scratch(built: Built) -> None:
    """32 heads' worth of splits: one wave of 16 rows and 513 floats."""
    call = put(built, problem(Shape(heads=16, capacity=32768), [(5, 1)]))
    assert call.scratch_bytes == 132 * 16 * 513 * 4
    call.close()


@pytest.mark.parametrize(
    ("shape", "changed"),
    [(Shape(heads=5, new=9), {}), (Shape(heads=5, latent=512, rope=80), {}),
     (Shape(heads=5), {"scale": 0.0})],
)  # fmt: skip
def test_what_the_plugin_refuses_is_an_error(
    built: Built, shape: Shape, changed: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    given = problem(shape, [(1, 1)])
    for name, value in changed.items():
        object.__setattr__(given, name, value)
    with pytest.raises(ValueError, match="refuses these sizes"):
        put(built, given)
    assert "MlaDecode: " in capfd.readouterr().err


def test_a_compiler_s_complaint_is_told(tmp_path: Path) -> None:
    toolkit()
    with pytest.raises(RuntimeError, match=r"(?s)cmake: .*compute_7"):
        built_for(7, tmp_path, tmp_path)


def test_triton_kernels_are_for_the_sizes_they_were_compiled_for(tmp_path: Path) -> None:
    variant = {"dtype": "fp16", "storage": "int8", "latent": 512, "rope": 64, "tile": 512,
               "rope_tile": 32, "scale": 1.5 * 576**-0.5, "rows": 16}  # fmt: skip
    kernels = [{"step": "join", "sm": 90, "cubin": "x", "entry": "x"}]
    text = json.dumps({"variant": variant, "kernels": kernels})
    (tmp_path / "index.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="no kernel for SM 87"):
        CompiledTriton(tmp_path, 87)
    compiled = CompiledTriton(tmp_path, 90)
    taken = problem(Shape(heads=5), [(1, 1)], storage="int8")
    assert compiled.takes(taken, "fp16") and not compiled.takes(taken, "bf16")
    others = (problem(Shape(heads=5), [(1, 1)]), problem(Shape(heads=5, rope=32), [(1, 1)]))
    assert not any(compiled.takes(other, "fp16") for other in others)


@pytest.mark.parametrize("timed", on_device.TIMED, ids=str)
def test_least_bytes_are_those_of_the_arrays(timed: on_device.Timed) -> None:
    short = on_device.Timed(timed.batch, timed.heads, timed.new, 64, timed.storage)
    call = short.problem(0)
    out_bytes = 2 * timed.batch * timed.new * timed.heads * 512
    # New rows are read and written: their slots are among the cache's rows, which are all read.
    written = call.new_row_BSE.nbytes
    arrays = (call.query_BSHE, call.new_row_BSE, call.cache_B1ME, call.scales_B1MG)
    assert short.bytes_moved() == sum(a.nbytes for a in arrays) + out_bytes + written
    wide = call.cache_B1ME.astype(np.float32) if timed.storage == "plain" else call.scales_B1MG
    assert np.isfinite(wide).all()


def test_a_report_says_of_which_source_it_is() -> None:
    """docs/devices.py says so where the kernels have changed since."""
    assert REPORTS, "a report of a device is kept"
    for path in REPORTS:
        facts = json.loads(path.read_text("utf-8"))
        assert facts["passed"] and facts["checks"] and facts["timings"]
        assert all(row["passed"] for row in facts["checks"])
        assert len(facts["source_sha256"]) == 64


@pytest.mark.gpu
def test_numbers_on_the_gpu(tmp_path: Path, tensorrt_headers: Path) -> None:
    device = on_device.Device(Built(Path(), Path()), [], [132])
    facts = device.cuda.facts()
    device.built = built_for(int(facts["sm"].replace(".", "")), tmp_path, tensorrt_headers)
    report = on_device.report(device, short=True)
    assert report["passed"] and len(report["checks"]) == 36
