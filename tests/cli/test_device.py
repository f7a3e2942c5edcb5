"""`build --package`, `validate --device-report`, `validate --engine` and `run --engine`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mla_deploy.device.files import sealed
from mla_deploy.trust import remember
from tests.cli.conftest import Command
from tests.device.cuda_stand_in import device, jetson_bundle, model_bundle, with_engines
from tests.small_bundle import names_in

__all__ = ["device"]


def test_a_package_is_written_and_told(command: Command, tmp_path: Path) -> None:
    model_bundle(tmp_path / "b")
    ran = command("build", tmp_path / "b", "--package", tmp_path / "p", "--json")
    result = ran.object("build")["result"]
    assert result["golden_from"] == "onnxruntime" and result["path"] == str(tmp_path / "p")
    assert {"build.sh", "build.py", "verify.py", "package.json"} <= set(names_in(tmp_path / "p"))
    assert "engine" not in names_in(tmp_path / "b")
    ran = command("build", tmp_path / "b", "--package", tmp_path / "p")
    assert ran.status == 8 and "error[BUN-EXISTS]" in ran.err
    ran = command("build", tmp_path / "b", "--package", tmp_path / "q")
    assert ran.status == 0 and "nothing was built" in ran.out and "python3 verify.py" in ran.out


@pytest.mark.parametrize(
    "options",
    [("--source", "ckpt"), ("--package", "p", "--timeout", "9"), ("--package", "p", "--dry-run"),
     ("--package", "p", "--replace")],
)  # fmt: skip
def test_options_that_do_not_go_together(
    command: Command, tmp_path: Path, options: tuple[str, ...]
) -> None:
    jetson_bundle(tmp_path / "b")
    ran = command("build", tmp_path / "b", *options)
    assert ran.status == 2 and "error[CLI-USAGE]" in ran.err
    assert names_in(tmp_path) == ["b"]


def test_a_report_is_judged(command: Command, tmp_path: Path) -> None:
    bundle = jetson_bundle(tmp_path / "b")
    report = tmp_path / "report.json"
    facts = {"format_version": 1, "bundle_digest": bundle.digest, "package_digest": "0" * 64,
             "golden_from": "pytorch", "device": {"name": "Orin", "sm": "8.7"},
             "tensorrt": {"package": "tensorrt", "version": "10.16.2"}, "checks": []}  # fmt: skip
    report.write_bytes(sealed(facts))
    ran = command("validate", tmp_path / "b", "--device-report", report)
    assert ran.status == 3 and "error[VAL-DEVICE]" in ran.err
    assert "NOT passed on Orin (tensorrt 10.16.2)" in ran.out
    figures = {"positions": 4, "max_abs": 0.01, "largest_logit": 9.0, "rel_l2": 1e-3, "flips": 0,
               "mean_kl": 1e-6, "near_ties": 0, "cache_rel_l2": 1e-3, "batch": 2,
               "cache_bytes": 2 * 64 * 48}  # fmt: skip
    row = {"name": "numbers batch-2", "status": "passed", "told": "fine", "figures": figures}
    report.write_bytes(sealed({**facts, "checks": [row]}))
    result = command("validate", tmp_path / "b", "--device-report", report, "--json").object(
        "validate"
    )["result"]
    assert result["passed"] is True and result["device"] == "Orin"
    ran = command("validate", tmp_path / "b", "--device-report", report, "--threads", "1")
    assert ran.status == 2 and "--threads does not go with --device-report" in ran.err
    ran = command("validate", tmp_path / "b")
    assert ran.status == 2 and "--source" in ran.err


def test_engines_are_checked_and_run(command: Command, device: Path, tmp_path: Path) -> None:
    made = with_engines(model_bundle(tmp_path / "m"))
    assert made.engine is not None
    ran = command("run", tmp_path / "m", "--engine", "--prompt", "a", "--max-new-tokens", "4")
    assert ran.status == 5 and "error[ENG-TRUST]" in ran.err and "--trust" in ran.err
    trust = ("--trust", made.engine.digest)
    ran = command("run", tmp_path / "m", "--engine", *trust, "--prompt", "a",
                  "--max-new-tokens", "4", "--json")  # fmt: skip
    assert ran.object("run")["result"]["cache_capacity_tokens"] == 64
    ran = command("run", tmp_path / "m", *trust, "--prompt", "a")
    assert ran.status == 6 and "error[RUN-TARGET]" in ran.err
    remember(made.engine.digest, "built")
    ran = command("validate", tmp_path / "m", "--engine")
    assert ran.status == 0 and "run on this device" in ran.out
    ran = command("validate", tmp_path / "m", "--engine", "--json")
    assert ran.object("validate")["result"]["on_device"] is True
    ran = command("validate", tmp_path / "m", "--engine", "--junit", "x.xml")
    assert ran.status == 2
    assert json.loads(device.read_text().splitlines()[-1])[0] == "deserialize_cuda_engine"
