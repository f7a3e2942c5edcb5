"""Engines of TensorRT-RTX, built with no GPU: every line's graphs build, and memory is measured.

Activation bytes are what the builder says an execution context needs beside weights and bound
caches, for one row in fp16.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mla_deploy import build
from mla_deploy.export import export
from tests.export.published_shapes import SHAPES, write_shape
from tests.exported import exported

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)
ROOT = Path(__file__).parents[2]
MB = 10**6
CHUNK = 512  # what a runner prefills at a time


def built(bundle: Path, graph: str, new_tokens: int) -> dict[str, Any]:
    """What the builder says of one graph, built in a process of its own."""
    path = bundle / f"{graph}.onnx"
    command = [sys.executable, "-m", "tests.export.rtx_build", str(path), str(new_tokens)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert report["errors"] == [] and report["plan_bytes"] > 0
    return report


def activation(bundle: Path, graph: str, new_tokens: int) -> int:
    [found] = built(bundle, graph, new_tokens)["activation_bytes"]
    return int(found)


@pytest.mark.parametrize("target", ["jetson-orin-jp6", "jetson-thor-jp7", "rtx-40"])
def test_graphs_of_every_line_build(target: str) -> None:
    """Their operators are the builder's too; the cache is updated in place where it can be."""
    made = exported("v2-lite", target=target, dtype="fp16", capacity=64)
    layers = 2
    for graph, new_tokens in (("prefill", 32), ("decode", 1)):
        report = built(made.bundle.path, graph, new_tokens)
        assert report["cache_updates"] == (0 if target == "jetson-orin-jp6" else layers)
        fused = [name for name in report["kernels"] if "_mha_" in name]
        is_fused = graph == "prefill" and target != "jetson-orin-jp6"
        assert len(fused) == (layers if is_fused else 0)


@pytest.fixture(scope="module")
def v2_lite(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Bundles of one layer in DeepSeek-V2-Lite's shape, by capacity."""
    folder = tmp_path_factory.mktemp("v2-lite")
    checkpoint = write_shape(folder / "checkpoint", "v2-lite")
    found = {}
    for capacity in (4096, 32768):
        found[capacity] = folder / str(capacity)
        export(checkpoint, found[capacity], target="rtx-30", capacity=capacity)
    return found


@pytest.mark.parametrize(("capacity", "most_mb"), [(4096, 20), (32768, 85)])
def test_decode_needs_little(v2_lite: dict[int, Path], capacity: int, most_mb: int) -> None:
    assert activation(v2_lite[capacity], "decode", 1) <= most_mb * MB


def test_decode_needs_a_seventh_of_what_expanding_takes(v2_lite: dict[int, Path]) -> None:
    """The prefill graph with one new token is the same step, not absorbed."""
    expanded = activation(v2_lite[32768], "prefill", 1)
    assert expanded >= 7 * activation(v2_lite[32768], "decode", 1)


def test_prefill_needs_little(v2_lite: dict[int, Path]) -> None:
    assert activation(v2_lite[4096], "prefill", CHUNK) <= 100 * MB


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes_build(tmp_path: Path, name: str) -> None:
    """One layer in fp16 and bf16; attention is one fused kernel in prefill, none in decode."""
    checkpoint = write_shape(tmp_path / "checkpoint", name)
    for dtype in ("fp16", "bf16"):
        bundle = tmp_path / dtype
        export(checkpoint, bundle, target="rtx-50", dtype=dtype, capacity=4096)
        decode, prefill = built(bundle, "decode", 1), built(bundle, "prefill", CHUNK)
        assert decode["activation_bytes"][0] <= 20 * MB
        assert [any("_mha_" in n for n in r["kernels"]) for r in (decode, prefill)] == [False, True]
        assert decode["cache_updates"] == prefill["cache_updates"] == 1


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["minicpm3", "youtu"])
def test_eight_layers_build_within_three_times_their_weights(tmp_path: Path, name: str) -> None:
    """Both engines by the product's own builder, audit passed, host memory as the README says."""
    checkpoint = write_shape(tmp_path / "checkpoint", name, layers=8)
    bundle = export(checkpoint, tmp_path / "bundle", target="rtx-40", capacity=4096)
    weights = int(bundle.manifest["weights"]["bytes"])
    made = build(bundle.path, audit_mode="fail")
    for graph in made.report.graphs:
        assert graph.peak_host_bytes <= 3 * weights + 10**9, graph.graph
        assert graph.layers["KV_CACHE_UPDATE"] == 8
