"""`check_engines`: on a GPU (stand-ins that compute), and without one (TensorRT-RTX builds)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

import mla_deploy
from mla_deploy.bundle import Bundle, open_bundle, stage_engine
from mla_deploy.device_package import check_engines
from mla_deploy.errors import MlaDeployError
from mla_deploy.trust import remember
from tests.device.cuda_stand_in import deserialised, device, model_bundle, with_engines
from tests.engine.engine_bundle import write_engine_bundle

__all__ = ["device"]
real = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)


@pytest.fixture
def engines(device: Path, tmp_path: Path) -> Bundle:
    made = with_engines(model_bundle(tmp_path / "m"))
    assert made.engine is not None
    remember(made.engine.digest, "built")
    return made


def test_on_a_device_they_are_run(engines: Bundle) -> None:
    verdict = check_engines(engines)
    status = {line.name: line.status for line in verdict.lines}
    assert verdict.on_device and verdict.passed and verdict.refusal is None
    assert status["numbers batch-1"] == status["numbers batch-3"] == "passed"
    assert status["memory decode 0"] == status["latency decode"] == "passed"
    assert status["graphs on ONNX Runtime"] == "not run"
    assert status["audit"] == "not run"


@pytest.mark.parametrize("mode", ["is wrong", "is hungry"])
def test_a_wrong_engine_is_no(engines: Bundle, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("STAND_IN_MODE", mode)
    verdict = check_engines(engines)
    assert verdict.on_device and not verdict.passed
    assert verdict.refusal is not None
    assert (verdict.refusal.code, verdict.refusal.exit_status) == ("VAL-ENGINE", 3)


def test_on_another_gpu_nothing_is_loaded(
    engines: Bundle, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_SM", "110")
    verdict = check_engines(engines)
    assert not verdict.on_device and verdict.passed
    assert "SM 8.7, here is 11.0" in verdict.why_not
    assert deserialised(device) == 0


def test_untrusted_engines_are_refused_where_they_would_run(device: Path, tmp_path: Path) -> None:
    made = with_engines(model_bundle(tmp_path / "m"))
    with pytest.raises(MlaDeployError) as caught:
        check_engines(made)
    assert caught.value.code == "ENG-TRUST"
    assert deserialised(device) == 0


def changed_record(bundle: Bundle, **changes: Any) -> Bundle:
    """engine.json with members changed, sealed again; the plans as they are."""
    assert bundle.engine is not None
    facts = json.loads(json.dumps(dict(bundle.engine.facts)))
    plans = {g: bundle.engine.read_plan(g) for g in ("prefill", "decode")}  # type: ignore[arg-type]
    for name in ("files", "check", "format_version"):
        facts.pop(name)
    with stage_engine(bundle, replace=True) as stage:
        for graph, plan in plans.items():
            stage.write_bytes(f"{graph}.plan", plan)
        made = stage.publish({**facts, **changes})
    assert made.engine is not None
    remember(made.engine.digest, "trusted")
    return open_bundle(bundle.path)


@real
def test_without_a_gpu_only_what_was_checked_is_said(tmp_path: Path) -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("there is a GPU here")
    write_engine_bundle(tmp_path / "b")
    made = mla_deploy.build(tmp_path / "b")
    verdict = check_engines(tmp_path / "b")
    assert verdict.passed and not verdict.on_device and verdict.why_not
    lines = {line.name: line for line in verdict.lines}
    for name in ("device io", "device memory", "numbers", "latency"):
        assert lines[name].status == "not run" and "not run on a device" in lines[name].told
    for name in ("files", "release", "sm", "profiles", "plan decode", "audit",
                 "activations decode:batch=1..4@1,new_tokens=1"):  # fmt: skip
        assert lines[name].status == "passed", lines[name]
    facts = made.bundle.engine.facts if made.bundle.engine else {}
    report = json.loads(json.dumps(facts["report"]))
    report["graphs"][1]["profiles"][0]["activation_bytes"] = 1 << 40
    bad = check_engines(changed_record(made.bundle, report=report))
    assert [line.name for line in bad.lines if line.status == "failed"] == [
        "activations decode:batch=1..4@1,new_tokens=1"
    ]
    assert bad.refusal is not None and bad.refusal.exit_status == 3
    bad = check_engines(changed_record(made.bundle, sms=["8.0"], release="10.16"))
    assert [line.name for line in bad.lines if line.status == "failed"] == ["release", "sm"]
    with pytest.raises(MlaDeployError) as caught:
        check_engines(open_bundle(tmp_path / "b", engine=False))
    assert caught.value.code == "ENG-MISSING"
