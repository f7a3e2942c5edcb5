"""A package for a release before the override flag: a graph without MlaDecode's function, too."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import onnx
import pytest

from mla_deploy.bundle import open_bundle
from mla_deploy.device import build, verify
from mla_deploy.device_package import judge_report, plugin_files, write_package
from mla_deploy.device_package.plugin_files import PluginFiles
from tests.device.cuda_stand_in import device
from tests.device_package.test_scripts import TOOL
from tests.exported import TINY, exported_checkpoint

__all__ = ["device"]
PROFILES = ("prefill:batch=1..4,new_tokens=1..32", "decode:batch=1..4")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For TensorRT 10.3; kernels are compiled elsewhere (`tests/plugins`)."""
    made = exported_checkpoint(TINY, target="jetson-orin-jp6", dtype="fp16", capacity=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugin_files, "_is_compiled_for", lambda _: False)
        place = tmp_path_factory.mktemp("bare") / "p"
        return write_package(made.bundle, place, profiles=PROFILES, plugin="on").path


def functions(path: Path) -> set[str]:
    return {f.name for f in onnx.load(path, load_external_data=False).functions}


def test_the_graph_lies_beside_the_bundle(package: Path) -> None:
    facts = json.loads((package / "package.json").read_text())
    assert facts["plugin"]["called"] and facts["plugin"]["graphs"] == {
        "decode": "plugin/decode.onnx"}  # fmt: skip
    assert "plugin/decode.onnx" in facts["files"]
    whole = functions(package / "bundle" / "decode.onnx")
    assert whole - functions(package / "plugin" / "decode.onnx") == {"MlaDecode"}
    assert open_bundle(package / "bundle").digest == facts["bundle_digest"]  # nothing was added


@pytest.mark.parametrize("with_plugin", [True, False])
def test_built_and_verified_through_the_stand_ins(
    package: Path, device: Path, monkeypatch: pytest.MonkeyPatch, with_plugin: bool
) -> None:
    """Prefill copies the caches, and so does decode without the plugin; with it nothing does."""
    monkeypatch.setenv("STAND_IN_MODE", "copies caches")
    monkeypatch.setenv("STAND_IN_VERSION", "10.3.0.26")
    more = ["--plugin", "libmla.so"] if with_plugin else []
    where = ["--package", str(package), *more]
    assert build.main(where) == 0
    assert verify.main([*where, "--steps", "2"]) == 0
    verdict = judge_report(open_bundle(package / "bundle"), package / "report.json")
    assert verdict.passed
    calls = [json.loads(line) for line in device.read_text().splitlines()]
    assert ["load_library", "libmla.so"] in calls or not with_plugin
    told = {line.name: line.told for line in verdict.lines}
    assert ("the plugin writes" in told["alias decode"]) == with_plugin
    assert "two buffers" in told["alias prefill"]
    assert (package / "engines" / "without_body" / "decode.onnx").exists()


@pytest.mark.parametrize("with_plugin", [True, False])
def test_build_sh_takes_the_graph_of_the_plugin(
    package: Path, tmp_path: Path, with_plugin: bool
) -> None:
    (tmp_path / "trtexec").write_text(TOOL)
    (tmp_path / "trtexec").chmod(0o755)
    (tmp_path / "lib.so").write_bytes(b"")
    more = ["--plugin", str(tmp_path / "lib.so")] if with_plugin else []
    done = subprocess.run(
        ["bash", str(package / "build.sh"), *more], capture_output=True, text=True, check=False,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "RECORD": str(tmp_path / "record")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    flags = (tmp_path / "record").read_text().splitlines()
    graphs = [flag.removeprefix("--onnx=") for flag in flags if flag.startswith("--onnx=")]
    decode = "engines/without_body/decode.onnx" if with_plugin else "bundle/decode.onnx"
    assert graphs == ["bundle/prefill.onnx", decode]
    assert "--enablePluginOverride" not in flags
    model = onnx.load(package / decode, load_external_data=False)
    assert ("MlaDecode" in {f.name for f in model.functions}) != with_plugin
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":  # beside the graph, as a parser wants it
                assert os.path.isfile((package / decode).parent / entry.value)
    note = json.loads((package / "engines" / "build.json").read_text())
    assert note["plugin"] == with_plugin


def test_other_releases_get_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_files, "_is_compiled_for", lambda _: False)
    made = exported_checkpoint(TINY, target="jetson-orin-jp7", dtype="fp16", capacity=64)
    found: PluginFiles = write_package(made.bundle, tmp_path / "p", profiles=PROFILES).plugin
    assert found.called and not found.graphs
    assert not (tmp_path / "p" / "plugin" / "decode.onnx").exists()
