"""The stand-ins of CUDA and of `tensorrt` made ready: compiled once a run, and an environment."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mla_deploy.bundle import Bundle, open_bundle, stage_engine
from mla_deploy.engine.pipeline import plan_build
from mla_deploy.engine.profiles import GRAPHS
from tests.engine.engine_bundle import manifest, write_engine_bundle
from tests.exported import exported
from tests.tensorrt_names import python_path

STAND_IN = Path(__file__).with_name("stand_in")


@functools.lru_cache(maxsize=1)
def cudart() -> Path:
    """The compiled stand-in, under the name that a program looks for."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler for the stand-in of the CUDA runtime")
    library = Path(_folder.name) / "libcudart.so.13"
    source = STAND_IN / "cudart.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return library


_folder = tempfile.TemporaryDirectory(prefix="mla-deploy-cudart-")


def environment(record: Path | None = None, **more: str) -> dict[str, str]:
    """For a process that finds both stand-ins. The stand-in of `tensorrt` needs this project."""
    library = cudart()
    made = {
        **os.environ, "LD_LIBRARY_PATH": str(library.parent), "STAND_IN_CUDART": str(library),
        "PYTHONPATH": python_path(STAND_IN), **more,
    }  # fmt: skip
    if record is not None:
        made["STAND_IN_RECORD"] = str(record)
    return made


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This process, and those it starts, find both stand-ins; the path of the record of calls."""
    from mla_deploy.device import cuda

    record = tmp_path / "record"
    for name, value in environment(record).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(cuda, "LIBRARIES", (str(cudart()),))
    monkeypatch.syspath_prepend(str(STAND_IN))
    sys.modules.pop("tensorrt", None)
    yield record
    sys.modules.pop("tensorrt", None)


def deserialised(record: Path) -> int:
    """How often TensorRT was given a plan."""
    if not record.exists():
        return 0
    calls = [json.loads(line)[0] for line in record.read_text().splitlines()]
    return calls.count("deserialize_cuda_engine")


def with_engines(bundle: Bundle, **changes: Any) -> Bundle:
    """`bundle` with plans of the stand-in in `engine/`; `changes` go to engine.json."""
    import tensorrt

    planned = plan_build(bundle, profiles=("prefill:batch=1..4,new_tokens=1..32",))
    with stage_engine(bundle, replace=(bundle.path / "engine").exists()) as stage:
        for graph in GRAPHS:
            (found,) = planned.profiles[graph]
            shapes = found.shapes(bundle.inputs(graph))
            plan = json.dumps([str(bundle.path / f"{graph}.onnx"), [shapes]])
            (stage.path / f"{graph}.plan").write_text(plan)
            stage.adopt(f"{graph}.plan")
        graphs = {
            graph: {"plan": f"{graph}.plan", "profiles": [
                {"shapes": {name: {"min": list(low), "opt": list(best), "max": list(high)}
                            for name, (low, best, high) in
                            planned.profiles[graph][0].shapes(bundle.inputs(graph)).items()}}]}
            for graph in GRAPHS
        }  # fmt: skip
        stage.publish(
            {
                "bundle_digest": bundle.digest, "target": planned.target.name, "dtype": "fp16",
                "release": planned.release, "sms": list(planned.sms), "graphs": graphs,
                "runtime": {"package": "tensorrt", "version": tensorrt.__version__},
                "device": {"name": "Stand-in GPU", "multiprocessors": 16},
                "options": {"plugin": None}, **changes,
            }
        )  # fmt: skip
    return open_bundle(bundle.path)


def jetson_bundle(out: Path, **changes: Any) -> Bundle:
    """`engine_bundle.py`'s one small layer, which masks nothing, for a Jetson."""
    engine = {**manifest()["engine"], "release": "10.16", "writes_padding": True}
    return write_engine_bundle(out, target="jetson-orin-jp7", engine=engine, **changes)


def model_bundle(out: Path, **options: Any) -> Bundle:
    """A real model of several layers, exported for a Jetson, 64 tokens of capacity.

    `options` go to `export`.
    """
    asked: dict[str, Any] = {"target": "jetson-orin-jp7", "dtype": "fp16", "capacity": 64}
    made = exported("v3-yarn-all-dim", **{**asked, **options})
    shutil.copytree(made.bundle.path, out)
    return open_bundle(out)
