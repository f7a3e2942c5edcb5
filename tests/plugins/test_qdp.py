"""TensorRT's Python plugins: defined through TensorRT's own bindings, over stub libraries."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LIBRARIES = ("libnvinfer", "libnvonnxparser", "libnvinfer_plugin")
# What the bindings look up when they are imported; none is called.
STUB = """
#define NOTHING(name) void *name(void) { return 0; }
NOTHING(createInferBuilder_INTERNAL) NOTHING(createInferRefitter_INTERNAL)
NOTHING(createInferRuntime_INTERNAL) NOTHING(createNvOnnxParser_INTERNAL)
NOTHING(createNvOnnxParserRefitter_INTERNAL) NOTHING(getPluginRegistry)
NOTHING(getBuilderPluginRegistry) NOTHING(getLogger)
int getNvOnnxParserVersion(void) { return 110400; }
int getInferLibVersion(void) { return 110400; }
int initLibNvInferPlugins(void) { return 1; }
"""


def bindings() -> Path:
    """The unpacked wheel tensorrt-cu13-bindings: $TENSORRT_BINDINGS, or where it is installed."""
    given = os.environ.get("TENSORRT_BINDINGS")
    if given:
        return Path(given) / "tensorrt_bindings"
    found = importlib.util.find_spec("tensorrt_bindings")
    if found is None or found.origin is None:
        pytest.skip("needs the package tensorrt-cu13-bindings 11, or TENSORRT_BINDINGS")
    return Path(found.origin).parent


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    package = bindings()
    if importlib.util.find_spec("triton") is None or shutil.which("gcc") is None:
        pytest.skip("needs triton and gcc")
    folder = tmp_path_factory.mktemp("bindings")
    # Plain `tensorrt` is a package of its own, which asks for the real libraries.
    (folder / "tensorrt").symlink_to(package)
    (folder / "stub.c").write_text(STUB, encoding="utf-8")
    for name in LIBRARIES:
        command = ["gcc", "-shared", "-fPIC", "stub.c", "-o", f"{name}.so.11"]
        subprocess.run(command, cwd=folder, check=True)
    environment = {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": f"{folder}:{ROOT}",
                   "TRITON_CACHE_DIR": str(folder / "triton")}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tests.plugins.qdp_worker"], cwd=ROOT, capture_output=True,
        text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_tensorrt_takes_the_definitions(told: dict[str, Any]) -> None:
    lengths = ["cache_lengths", "new_lengths"]
    refused = told["registered"].pop("refused")
    assert told["registered"] == {
        "mla_deploy::mla_decode_append": [["new_row", "cache", *lengths], ["latent", "sm"], 1],
        "mla_deploy::mla_decode_attend": [
            ["query", "cache", *lengths], ["scale", "latent", "heads", "splits", "rows", "sm"], 2
        ],
        "mla_deploy::mla_decode_join": [["partial", "log_sum"], ["heads", "dtype", "sm"], 1],
    }  # fmt: skip
    # The same check says no to a body that leaves a tensor out.
    assert "does not match the expected" in refused[0]


def test_launches_fit_the_kernels(told: dict[str, Any]) -> None:
    """B 2, S 3, H 16, M 4096, L 512, 8 splits, 32 rows a block: numbers in each kernel's order."""
    append, attend, join = (told["launches"][step] for step in ("append", "attend", "join"))
    assert (append["grid"], append["extra"]) == ([3, 2, 1], [3, 4096])
    assert (attend["grid"], attend["extra"]) == ([2, 8, 2], [3, 16, 4096, 8])
    assert (join["grid"], join["extra"]) == ([96, 1, 1], [8])
    # Tensors in, numbers, tensors out: what TensorRT passes is what the machine code takes.
    assert append["parameters"] == 4 + 2 + 1
    assert attend["parameters"] == 4 + 4 + 2
    assert join["parameters"] == 2 + 1 + 1
    assert told["shapes"] == {
        "partial": [2, 48, 8, 512], "log_sum": [2, 48, 8], "out": [2, 3, 16, 512]
    }  # fmt: skip
