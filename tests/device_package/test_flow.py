"""A device package from the bundle to the verdict: written, built, verified, judged.

Build and verify run the package's own scripts, in processes that find stand-ins of TensorRT and
CUDA which compute (`tests/device/stand_in`): right engines pass, and each wrong one fails.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mla_deploy.bundle import Bundle
from mla_deploy.device import build, verify
from mla_deploy.device.files import sealed
from mla_deploy.device_package import judge_report, write_package
from mla_deploy.errors import MlaDeployError
from tests.device.cuda_stand_in import deserialised, device, environment, model_bundle
from tests.exported import exported

__all__ = ["device"]
PROFILES = ("prefill:batch=1..4,new_tokens=1..32", "decode:batch=1..4")


@dataclass(frozen=True)
class Made:
    """A package with engines and a report that passed, and the bundle it is of."""

    bundle: Bundle
    package: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("package")
    bundle = model_bundle(folder / "bundle")
    source = exported("v3-yarn-all-dim", target="jetson-orin-jp7", dtype="fp16", capacity=64)
    written = write_package(bundle, folder / "p", source=source.checkpoint, profiles=PROFILES)
    assert written.golden_from == "pytorch"
    assert written.cases == ("batch-1", "batch-3", "prompt-32")
    for script in ("build.py", "verify.py"):
        ran = run(folder / "p", script)
        assert ran.returncode == 0, ran.stderr + ran.stdout
    return Made(bundle, folder / "p")


def run(package: Path, script: str, *arguments: str, **more: str) -> Any:
    return subprocess.run(
        [sys.executable, str(package / script), *arguments], env=environment(**more),
        capture_output=True, text=True, cwd=package.parent, check=False,
    )  # fmt: skip


@pytest.fixture
def package(made: Made, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(made.package, tmp_path / "p"))


def test_the_package_is_whole_and_needs_nothing_of_ours(made: Made) -> None:
    facts = json.loads((made.package / "package.json").read_text())
    listed = {name: record["sha256"] for name, record in facts["files"].items()}
    for name, digest in listed.items():
        assert hashlib.sha256((made.package / name).read_bytes()).hexdigest() == digest
    later = {"package.json", "report.json", "engines/prefill.plan", "engines/decode.plan",
             "engines/build.json"}  # fmt: skip
    files = {p.relative_to(made.package).as_posix() for p in made.package.rglob("*")
             if p.is_file() and "__pycache__" not in p.parts}  # fmt: skip
    assert files == {*listed, *later}
    assert facts["bundle_digest"] == made.bundle.digest
    assert facts["gate"]["rel_l2"] == 1e-2
    limits = facts["profiles"]["decode"][0]
    assert limits["activation_limit_bytes"] == (
        limits["activation_predicted_bytes"] * 5 // 4 + 4 * 2**20
    )
    for path in (*made.package.glob("*.py"), *made.package.glob("mla_device/*.py")):
        text = path.read_text()
        assert "mla_deploy" not in text and "import torch" not in text, path
    assert sorted(os.listdir(made.package.parent)) == ["bundle", "p"]  # no stage, no lock


def test_golden_outputs_are_of_several_calls(made: Made) -> None:
    facts = json.loads((made.package / "package.json").read_text())["golden"]
    assert facts["from"] == "pytorch"
    assert facts["cases"][1]["graphs"] == ["prefill", "prefill", *["decode"] * 8]
    arrays = np.load(made.package / "golden.npz")
    vocab = made.bundle.manifest["model"]["vocab_size"]
    assert arrays["batch-3.logits"].shape == (10, 3, vocab)
    assert arrays["batch-3.new.0"].tolist() == [17, 5, 1]
    assert arrays["batch-3.cache.0.2"].shape[0] == 1 + 5 + 8
    assert np.ptp(arrays["batch-1.logits"]) > 0.1


def test_a_right_report_is_judged_so(made: Made) -> None:
    report = json.loads((made.package / "report.json").read_text())
    assert report["passed"] is True
    verdict = judge_report(made.bundle, made.package / "report.json")
    assert verdict.passed and verdict.refusal is None
    assert (verdict.device, verdict.tensorrt) == ("Stand-in GPU", "tensorrt 10.16.2.1")
    status = {line.name: line.status for line in verdict.lines}
    assert set(status.values()) == {"passed"}
    assert {"files", "gpu", "version", "io prefill", "alias decode", "memory decode 0",
            "numbers batch-1", "numbers batch-3", "numbers prompt-32", "latency decode",
            "target", "release"} <= set(status)  # fmt: skip
    rows = {row["name"]: row for row in report["checks"]}
    assert rows["latency decode"]["figures"]["cuda_graph"] is True
    # Against the PyTorch source, stored in fp16: near, not equal.
    assert 0 < rows["numbers batch-3"]["figures"]["rel_l2"] < 1e-2
    assert rows["numbers batch-3"]["figures"]["recorded"] is True
    assert "nvpmodel" in report["power"]["before"]
    assert report["built"]["by"] == "build.py"


def test_engines_that_copy_caches_are_right_too(
    made: Made, package: Path, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_MODE", "copies caches")
    assert verify.main(["--package", str(package), "--steps", "2"]) == 0
    verdict = judge_report(made.bundle, package / "report.json")
    assert verdict.passed
    assert {x.name for x in verdict.lines if x.status == "not run"} == {
        "alias prefill", "alias decode"}  # fmt: skip


def test_the_script_ends_with_3(made: Made, package: Path) -> None:
    ran = run(package, "verify.py", "--steps", "2", STAND_IN_MODE="is wrong")
    assert ran.returncode == 3, ran.stderr
    assert "failed   numbers batch-1" in ran.stdout and "FAILED" in ran.stdout
    assert not judge_report(made.bundle, package / "report.json").passed


@pytest.mark.parametrize(
    ("mode", "failed"),
    [
        ("gives NaN", "numbers prompt-32"),
        ("forgets", "numbers batch-3"),
        ("lacks an output", "io decode"),
        ("aliases elsewhere, is hungry", "alias prefill; memory prefill 0; memory decode 0"),
    ],
)
def test_a_wrong_engine_fails(
    made: Made, package: Path, device: Path, monkeypatch: pytest.MonkeyPatch, mode: str, failed: str
) -> None:
    """In this process, which has loaded what the stand-ins need; the script is the same."""
    monkeypatch.setenv("STAND_IN_MODE", mode)
    assert verify.main(["--package", str(package), "--steps", "2"]) == 3
    verdict = judge_report(made.bundle, package / "report.json")
    assert not verdict.passed
    assert set(failed.split("; ")) <= {x.name for x in verdict.lines if x.status == "failed"}
    refusal = verdict.refusal
    assert refusal is not None and (refusal.code, refusal.exit_status) == ("VAL-DEVICE", 3)


@pytest.mark.parametrize(
    ("more", "failed", "told"),
    [
        ({"STAND_IN_SM": "110"}, "gpu", "SM 11.0, built for 8.7"),
        ({"STAND_IN_VERSION": "10.3.0"}, "version", "here is tensorrt 10.3.0"),
    ],
)
def test_another_device_runs_nothing(
    made: Made, package: Path, device: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], more: dict[str, str], failed: str, told: str,
) -> None:  # fmt: skip
    for name, value in more.items():
        monkeypatch.setenv(name, value)
    assert verify.main(["--package", str(package)]) == 3
    said = capsys.readouterr().out
    assert told in said and "not run  numbers" in said
    assert deserialised(device) == 0
    verdict = judge_report(made.bundle, package / "report.json")
    assert failed in {line.name for line in verdict.lines if line.status == "failed"}
    assert not verdict.passed


def test_a_damaged_package_runs_nothing(package: Path) -> None:
    path = package / "bundle" / "decode.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    ran = run(package, "verify.py")
    assert ran.returncode == 3 and "decode.onnx has other bytes" in ran.stdout
    text = (package / "package.json").read_bytes()
    (package / "package.json").write_bytes(text.replace(b"10.16", b"10.13", 1))
    for script in ("build.py", "verify.py"):
        ran = run(package, script)
        assert ran.returncode == 5 and "package.json is not as it was written" in ran.stderr


@pytest.mark.parametrize(
    ("mode", "told"),
    [("does not parse", "No importer registered"), ("does not build", "nobody knows why")],
)
def test_a_build_that_fails_says_why(
    package: Path, device: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], mode: str, told: str,
) -> None:  # fmt: skip
    where = ["--package", str(package)]
    assert build.main([*where, "--workspace", "64"]) == 0
    assert '["set_memory_pool_limit", "WORKSPACE", 67108864]' in device.read_text()
    monkeypatch.setenv("STAND_IN_MODE", mode)
    capsys.readouterr()
    assert build.main(where) == 6
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1
    assert build.main([*where, "--plugin", "libmla.so"]) == 6
    assert "call no plugin" in capsys.readouterr().err


def edited(package: Path, **changes: Any) -> Path:
    """The report with members changed and sealed again: a device's word against our sums."""
    path = package / "report.json"
    path.write_bytes(sealed({**json.loads(path.read_text()), **changes}))
    return path


def with_figures(package: Path, name: str, **figures: Any) -> Path:
    checks = json.loads((package / "report.json").read_text())["checks"]
    for row in checks:
        if row["name"] == name:
            row["figures"].update(figures)
    return edited(package, checks=checks)


@pytest.mark.parametrize(
    ("name", "figures", "told"),
    [
        ("numbers batch-1", {"rel_l2": 0.011}, "wanted at most 0.01"),
        ("numbers batch-1", {"rel_l2": None}, "rel_l2 is inf"),
        ("numbers batch-1", {"mean_kl": 0.0011}, "mean_kl"),
        ("numbers batch-1", {"cache_rel_l2": 0.02}, "cache_rel_l2"),
        ("numbers batch-1", {"flips": 5}, "top-1"),
        ("numbers batch-1", {"positions": 0}, "no position"),
        ("numbers batch-1", {"cache_bytes": 1}, "the caches took 1 bytes"),
        ("numbers batch-1", {"rel_l2": "small"}, "not in form"),
        ("numbers batch-1", {"batch": []}, "not in form"),
        ("memory decode 0", {"found": 1 << 40}, "of activations, at most"),
        ("memory decode 0", {"profile": "decode:batch=1..8000"}, ""),
    ],
)
def test_a_report_that_calls_itself_passed_is_not_believed(
    made: Made, package: Path, name: str, figures: dict[str, Any], told: str
) -> None:
    verdict = judge_report(made.bundle, with_figures(package, name, **figures))
    lines = {line.name: line for line in verdict.lines}
    if "profile" in figures:  # a larger profile allows more, and the caches tell
        assert lines[name].status == "passed"
        return
    assert not verdict.passed
    assert lines[name].status == "failed" and told in lines[name].told


def test_a_report_without_numbers_shows_nothing(made: Made, package: Path) -> None:
    checks = json.loads((package / "report.json").read_text())["checks"]
    kept = [row for row in checks if not row["name"].startswith("numbers")]
    verdict = judge_report(made.bundle, edited(package, checks=kept))
    assert not verdict.passed and verdict.refusal is not None
    assert "numbers" in verdict.refusal.message
    device = {"name": "H100", "sm": "9.0"}
    verdict = judge_report(made.bundle, edited(package, checks=checks, device=device))
    assert [line.name for line in verdict.lines if line.status == "failed"] == ["target"]
    library = {"package": "tensorrt", "version": "10.3.0"}
    verdict = judge_report(made.bundle, edited(package, tensorrt=library))
    assert "release" in [line.name for line in verdict.lines if line.status == "failed"]


def refused(bundle: Bundle, report: Path, code: str, exit_status: int) -> str:
    with pytest.raises(MlaDeployError) as caught:
        judge_report(bundle, report)
    assert (caught.value.code, caught.value.exit_status) == (code, exit_status), caught.value
    return caught.value.message


def test_reports_that_are_none(made: Made, package: Path, tmp_path: Path) -> None:
    path = package / "report.json"
    text = path.read_bytes()
    other: tuple[tuple[dict[str, Any], int], ...] = (
        ({"bundle_digest": "0" * 64}, 5), ({"format_version": 2}, 6), ({"device": "Orin"}, 4),
        ({"tensorrt": {}}, 4), ({"checks": [1]}, 4),
    )  # fmt: skip
    for changes, status in other:
        path.write_bytes(text)
        refused(made.bundle, edited(package, **changes), "VAL-REPORT", status)
    path.write_bytes(text.replace(b'"passed": true', b'"passed": null', 1))
    refused(made.bundle, path, "VAL-REPORT", 5)
    path.write_bytes(b"[]\n")
    refused(made.bundle, path, "VAL-REPORT", 4)
    path.write_bytes(b"{")
    refused(made.bundle, path, "VAL-REPORT", 4)
    refused(made.bundle, tmp_path / "none.json", "FILE-MISSING", 4)
