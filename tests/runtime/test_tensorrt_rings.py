"""A model with sliding layers in the TensorRT runner and in a device package, over stand-ins."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mla_deploy import open_runner
from mla_deploy.bundle import Bundle, open_bundle
from mla_deploy.device import build, verify
from mla_deploy.device_package import judge_report, write_package
from mla_deploy.errors import GateError, MlaDeployError
from mla_deploy.runtime.tensorrt_runner import TensorRtRunner
from tests.device.cuda_stand_in import device
from tests.exported import exported_family
from tests.runtime.test_tensorrt_runner import built, on_cpu, same

__all__ = ["device"]
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7], [6, 5], [8]]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Windows of 12 tokens beside a capacity of 64."""
    options = {"target": "jetson-orin-jp7", "dtype": "fp16", "capacity": 64}
    made = exported_family("dots3_note_text", options)
    shutil.copytree(made.bundle.path, tmp_path / "b")
    rows = {entry["rows"] for entry in made.bundle.manifest["cache"]["tensors"]}
    assert rows == {"tokens", 12}
    return open_bundle(tmp_path / "b")


@pytest.fixture
def runner(bundle: Bundle, device: Path) -> Any:
    opened = open_runner(built(bundle), runtime="tensorrt", batch=3, chunk=5)
    yield opened
    opened.close()


def test_equal_to_the_graphs_on_onnx_runtime(bundle: Bundle, runner: TensorRtRunner) -> None:
    """Rings change places with every call, whole caches never; both graphs use the same ones."""
    cpu = on_cpu(bundle, 3)
    for _ in range(2):
        same(runner.prefill(PROMPTS), cpu.prefill(PROMPTS))
        for step in range(15):  # past the window
            tokens = [step, step + 7, 31 - step]
            same(runner.decode(tokens), cpu.decode(tokens))
        same(runner.prefill(PROMPTS), cpu.prefill(PROMPTS))
        for layer in cpu.cache_layers:
            for row in range(3):
                same(runner.cached_rows(layer, row), cpu.cached_rows(layer, row))
        assert runner.is_recorded
        runner.reset()
        cpu.reset()


def test_nothing_goes_on_over_torn_rings(
    bundle: Bundle, runner: TensorRtRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third chunk of a prompt fails: by then the rings hold tokens of the first two."""
    cpu = on_cpu(bundle, 3)
    runner.prefill([[1], [2], [3]])
    step, calls = runner._step, []

    def fails(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 3:
            raise GateError("RUN-NONFINITE", "for this test")
        return step(*given)

    monkeypatch.setattr(runner, "_step", fails)
    with pytest.raises(GateError):
        runner.prefill(PROMPTS)
    monkeypatch.undo()
    assert runner.lengths.tolist() == [1, 1, 1]
    with pytest.raises(MlaDeployError) as caught:
        runner.decode([1, 2, 3])
    assert caught.value.code == "ENG-STEP" and "reset" in caught.value.hint
    runner.reset()
    same(runner.prefill(PROMPTS), cpu.prefill(PROMPTS))


def test_a_device_package(bundle: Bundle, device: Path, tmp_path: Path) -> None:
    profiles = ("prefill:batch=1..4,new_tokens=1..32", "decode:batch=1..4")
    package = write_package(bundle, tmp_path / "p", profiles=profiles, plugin="off").path
    assert build.main(["--package", str(package)]) == 0
    assert verify.main(["--package", str(package), "--steps", "2"]) == 0
    verdict = judge_report(bundle, package / "report.json")
    assert verdict.passed, verdict
    told = {line.name: line.status for line in verdict.lines}
    assert told["numbers batch-3"] == told["alias decode"] == "passed"
