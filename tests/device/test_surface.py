"""What the stand-ins stand in for: no more than NVIDIA's own libraries have."""

from __future__ import annotations

import ctypes
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mla_deploy.device import cuda
from mla_deploy.device.cuda import Cuda
from mla_deploy.device.failure import DeviceFailure
from mla_deploy.device.numbers import broken_gates, logit_numbers, relative_l2
from mla_deploy.validate.difference import logit_difference
from mla_deploy.validate.gates import GATES
from tests.device.cuda_stand_in import STAND_IN, cudart, environment

SOURCE = Path(cuda.__file__).read_text("utf-8")
CALLED = sorted(set(re.findall(r"\bcuda[A-Z][A-Za-z]+", SOURCE)))
CLASSES = {
    "_Engine": "ICudaEngine", "_Context": "IExecutionContext", "Runtime": "Runtime",
    "Builder": "Builder", "OnnxParser": "OnnxParser", "_Config": "IBuilderConfig",
    "_Profile": "IOptimizationProfile", "_Error": "ParserError",
}  # fmt: skip
ENUMS = ("NetworkDefinitionCreationFlag", "OnnxParserFlag", "ProfilingVerbosity", "BuilderFlag",
         "PreviewFeature", "MemoryPoolType", "DataType", "TensorIOMode")  # fmt: skip
OURS = {"values", "path", "profiles", "session", "run", "shapes"}


def nvidia() -> ctypes.CDLL:
    for name in cuda.LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    pytest.skip("no libcudart of NVIDIA's is here")


def test_nvidia_s_library_has_each_function() -> None:
    library = nvidia()
    assert len(CALLED) > 15
    assert [name for name in CALLED if not hasattr(library, name)] == []


def test_the_stand_in_of_cuda_has_no_others() -> None:
    defined = set(re.findall(r"\b(cuda[A-Z][A-Za-z]+)\(", (STAND_IN / "cudart.c").read_text()))
    assert defined == set(CALLED)
    assert all(hasattr(ctypes.CDLL(str(cudart())), name) for name in CALLED)


def test_without_a_gpu_nvidia_s_library_says_so() -> None:
    nvidia()
    if any(Path(name).exists() for name in ("/dev/nvidia0", "/dev/nvhost-gpu")):
        pytest.skip("there is a GPU here")
    with pytest.raises(DeviceFailure) as caught:
        Cuda()
    assert caught.value.kind == "environment" and caught.value.message.startswith("no GPU: ")


def test_the_stand_in_has_nothing_that_tensorrt_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods, properties and enum members, by name, of TensorRT-RTX's own Python package."""
    real = pytest.importorskip("tensorrt_rtx")
    monkeypatch.syspath_prepend(str(STAND_IN))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    fake: Any = importlib.import_module("tensorrt")
    monkeypatch.delitem(sys.modules, "tensorrt")
    lacking = [
        f"{theirs}.{name}"
        for ours, theirs in CLASSES.items()
        for name in vars(getattr(fake, ours))
        if not name.startswith("_") and name not in OURS
        and not hasattr(getattr(real, theirs), name)
    ]  # fmt: skip
    lacking += [
        f"{enum}.{name}"
        for enum in ENUMS
        for name in getattr(fake, enum).__members__
        if not hasattr(getattr(real, enum), name)
    ]
    assert lacking == []


def test_facts_of_the_device() -> None:
    code = "import json; from mla_deploy.device.cuda import Cuda; print(json.dumps(Cuda().facts()))"
    ran = subprocess.run([sys.executable, "-c", code], env=environment(STAND_IN_SM="121"),
                         capture_output=True, text=True, check=True)  # fmt: skip
    assert '"name": "Stand-in GPU", "sm": "12.1", "multiprocessors": 16' in ran.stdout
    assert '"cuda_runtime": "13.2"' in ran.stdout


def test_the_device_s_numbers_are_those_of_validate() -> None:
    """Two programs for one definition: neither may drift."""
    generator = np.random.default_rng(7)
    wanted = generator.standard_normal((6, 40)).astype(np.float32)
    found = (wanted + 0.2 * generator.standard_normal((6, 40))).astype(np.float32)
    ours = logit_numbers(wanted, found, 1e-2)
    theirs = logit_difference(wanted, found, 1e-2)
    for name in ("positions", "max_abs", "largest_logit", "rel_l2", "mean_kl", "flips",
                 "near_ties"):  # fmt: skip
        assert ours[name] == pytest.approx(getattr(theirs, name), rel=1e-9), name
    assert ours["flips"] > 0


def test_gates_by_hand() -> None:
    wanted = np.array([[0.0, 3.0, 4.0]], np.float32)
    found = np.array([[0.0, 3.0, 4.5]], np.float32)
    assert relative_l2(wanted, found) == pytest.approx(0.1)  # 0.5 of 5
    assert relative_l2(wanted, np.full_like(wanted, np.nan)) == float("inf")
    assert relative_l2(np.zeros((1, 2)), np.zeros((1, 2))) == 0.0
    gate = GATES["fp16"].to_dict()
    fine = {"max_abs": 9.0, "largest_logit": 4.0, "rel_l2": 0.01, "mean_kl": 0.001,
            "cache_rel_l2": 0.01, "positions": 200, "flips": 2, "near_ties": 0}  # fmt: skip
    assert broken_gates(fine, gate) == []
    for name, value in (("rel_l2", 0.0101), ("mean_kl", 0.0011), ("cache_rel_l2", float("nan")),
                        ("flips", 3)):  # fmt: skip
        assert len(broken_gates({**fine, name: value}, gate)) == 1, name
    exact = {**fine, "rel_l2": 0.0, "mean_kl": 0.0, "cache_rel_l2": 0.0, "flips": 0}
    assert broken_gates({**exact, "max_abs": 1e-4}, GATES["fp32"].to_dict()) == []
    assert len(broken_gates({**exact, "max_abs": 1.1e-4}, GATES["fp32"].to_dict())) == 1
    large = {**exact, "largest_logit": 1000.0, "max_abs": 1.9e-3}
    assert broken_gates(large, GATES["fp32"].to_dict()) == []
