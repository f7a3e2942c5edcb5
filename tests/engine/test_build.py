"""`mla_deploy.build`: real TensorRT-RTX engines of a small bundle; refusals that change nothing."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import onnx
import pytest

import mla_deploy
from mla_deploy.bundle import Bundle, open_bundle
from mla_deploy.engine import estimate, lint, pipeline
from mla_deploy.engine.lint_operators import operators
from mla_deploy.engine.pipeline import RTX_SMS, plan_build
from mla_deploy.errors import MlaDeployError
from tests.engine.engine_bundle import manifest, write_engine_bundle
from tests.engine.small_graphs import CAPACITY, ROW, chain, decode_layer, node, weight
from tests.exported import TINY, exported_checkpoint
from tests.small_bundle import names_in, write_bundle
from tests.tensorrt_names import python_path

STAND_IN = Path(__file__).with_name("stand_in")
real = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)


def broken() -> onnx.ModelProto:
    """A decode layer with an operator that TensorRT does not have."""
    made = decode_layer()
    made.graph.node.append(node("BitwiseNot", ["new_lengths"], ["flipped"], name="bits"))
    return made


def refused(folder: Path, code: str, exit_status: int, **options: Any) -> MlaDeployError:
    """The refusal of a build of the bundle in `folder`, which changes nothing there or beside."""
    before = {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()}
    with pytest.raises(MlaDeployError) as caught:
        mla_deploy.build(folder, **options)
    after = {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()}
    assert before == after
    assert (caught.value.code, caught.value.exit_status) == (code, exit_status), caught.value
    assert caught.value.hint
    return caught.value


@real
def test_both_engines_are_built_and_known_to_the_bundle(tmp_path: Path) -> None:
    bundle = write_engine_bundle(tmp_path / "b")
    steps: list[str] = []
    made = mla_deploy.build(
        tmp_path / "b", profiles=["decode:batch=1..2,capacity=64"], sms=("8.6", "8.9"),
        progress=lambda stage, *_: steps.append(stage),
    )  # fmt: skip
    assert names_in(tmp_path) == ["b"]  # no stage, no lock
    assert names_in(tmp_path / "b" / "engine") == ["decode.plan", "engine.json", "prefill.plan"]
    assert sorted(set(steps)) == ["building decode", "building prefill"]
    opened = open_bundle(tmp_path / "b")
    assert opened.digest == bundle.digest
    assert opened.engine is not None and made.bundle.engine is not None
    assert opened.engine.digest == made.bundle.engine.digest
    assert (opened.engine.release, opened.engine.sms) == ("rtx-1.7", ("8.6", "8.9"))
    facts = opened.engine.facts
    assert facts["bundle_digest"] == bundle.digest
    assert facts["runtime"]["package"] == "tensorrt_rtx"
    cache = {end: [batch, 1, CAPACITY, ROW] for end, batch in (("min", 1), ("opt", 2), ("max", 2))}
    assert facts["graphs"]["decode"]["profiles"][0]["shapes"]["latent_cache.0"] == cache
    assert facts["graphs"]["prefill"]["profiles"][0]["axes"]["new_tokens"]["max"] == 32
    plan = (tmp_path / "b" / "engine" / "decode.plan").read_bytes()
    assert opened.engine.read_plan("decode") == plan
    assert all(line.passed for line in made.audit) and len(made.audit) == 16
    told = facts["report"]["graphs"][1]["profiles"][0]["kernels"]
    ran = made.report.graphs[1].profiles[0].kernels
    assert told == [f"{kernel.type} {kernel.name}" for kernel in ran] and len(told) > 5
    json.dumps(made.to_dict())
    refused(tmp_path / "b", "BUN-EXISTS", 8)
    again = mla_deploy.build(tmp_path / "b", replace=True, audit_mode="off")
    assert again.audit == () and again.bundle.engine is not None
    assert names_in(tmp_path) == ["b"]


@real
def test_limits_passed_over_write_nothing(tmp_path: Path) -> None:
    write_engine_bundle(tmp_path / "b")
    error = refused(tmp_path / "b", "BLD-AUDIT", 3, limits={"decode.activation_bytes": 1000})
    assert "decode activation_bytes is 8," in error.message and "at most 1,000" in error.message
    made = mla_deploy.build(tmp_path / "b", limits={"activation_bytes": 1000}, audit_mode="warn")
    over = [(line.graph, line.rule) for line in made.audit if not line.passed]
    assert over == [("prefill", "activation_bytes"), ("decode", "activation_bytes")]


@real
def test_weight_streaming_builds(tmp_path: Path) -> None:
    write_engine_bundle(tmp_path / "b")
    made = mla_deploy.build(tmp_path / "b", weight_streaming=True)
    assert made.bundle.engine is not None
    assert made.bundle.engine.facts["options"]["weight_streaming"] is True


@real
def test_a_refusal_of_tensorrt_leaves_the_bundle_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the linter, so that the builder itself refuses in the middle of a build."""
    write_engine_bundle(tmp_path / "b", broken())
    monkeypatch.setattr(pipeline, "lint_graph", lambda *_: ())
    error = refused(tmp_path / "b", "BLD-PARSE", 4)
    assert "BitwiseNot" in error.message


def test_the_linter_is_asked_first(tmp_path: Path) -> None:
    write_engine_bundle(tmp_path / "b", broken())
    error = refused(tmp_path / "b", "BLD-LINT", 4)
    assert "prefill.onnx" in error.message
    planned = plan_build(tmp_path / "b")
    assert {finding.check for finding in planned.findings["decode"]} >= {"operator"}


def test_what_would_be_built(tmp_path: Path) -> None:
    write_engine_bundle(tmp_path / "b")
    planned = plan_build(tmp_path / "b", profiles=["prefill:new_tokens=1..8@4"])
    assert {g: [str(p) for p in found] for g, found in planned.profiles.items()} == {
        "prefill": ["prefill:batch=1,new_tokens=1..8@4"],
        "decode": ["decode:batch=1..4@1,new_tokens=1"],
    }
    assert planned.sms == ("8.9",) and planned.package == "tensorrt_rtx"
    weights = planned.predicted.weights_bytes
    assert planned.predicted.host_bytes == 3 * weights + 2**30
    # 4 rows of cache [64, 24] in fp16; 4 x 4 heads x 64 scores in fp32 and fp16; logits.
    decode = 8_192_000 + 4 * 64 * 24 * 2 + 4 * 4 * 64 * 6 + 4 * 32 * 6
    assert planned.predicted.activation_bytes["decode:batch=1..4@1,new_tokens=1"] == decode
    assert planned.findings == {"prefill": (), "decode": ()}
    json.dumps(planned.to_dict())


def test_a_cpu_bundle_has_no_engines(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b")
    error = refused(tmp_path / "b", "BLD-TARGET", 4)
    assert "--target rtx-40" in error.hint


def test_another_release_builds_on_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.importlib.util, "find_spec", lambda name: None)
    write_engine_bundle(tmp_path / "b", target="jetson-orin-jp7", release="10.16")
    planned = plan_build(tmp_path / "b")
    assert (planned.package, planned.sms, planned.findings["decode"]) == ("tensorrt", ("8.7",), ())
    error = refused(tmp_path / "b", "BLD-RUNTIME", 7)
    assert "--package" in error.hint and "--target rtx-40" in error.hint


def test_tensorrt_builds_through_the_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way with `tensorrt`, whose stand-in records the calls and builds nothing."""
    plugin_bundle(tmp_path / "b", "jetson-orin-jp7")
    monkeypatch.setenv("PYTHONPATH", python_path(STAND_IN))
    monkeypatch.setattr(pipeline.importlib.util, "find_spec", lambda name: object())
    library = tmp_path / "libmla.so"
    library.write_bytes(b"a plugin")
    made = mla_deploy.build(tmp_path / "b", plugin_library=library)
    assert made.bundle.engine is not None
    assert made.bundle.engine.facts["options"]["plugin"] == {
        "file": "libmla.so", "bytes": 8, "sha256": hashlib.sha256(b"a plugin").hexdigest(),
    }  # fmt: skip
    assert made.bundle.engine.facts["runtime"] == {"package": "tensorrt", "version": "10.16.2.1"}
    assert made.report.graphs[1].profiles[0].activation_bytes == 1000


@pytest.mark.parametrize(
    ("target", "release", "asked", "told"),
    [("rtx-40", "rtx-1.7", "9.0", ", ".join(RTX_SMS)), ("h100", "11", "8.0", "runs on, which is")],
)
def test_a_gpu_that_cannot_be_built_for(
    tmp_path: Path, target: str, release: str, asked: str, told: str
) -> None:
    write_engine_bundle(tmp_path / "b", target=target, release=release)
    assert told in refused(tmp_path / "b", "BLD-SM", 4, sms=(asked,)).message


def test_too_little_memory_and_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_missing", lambda *_: "")
    write_engine_bundle(tmp_path / "b")
    monkeypatch.setattr(estimate, "available_bytes", lambda: 2**30)
    error = refused(tmp_path / "b", "BLD-MEMORY", 7)
    assert "1.0 GiB are available" in error.message
    monkeypatch.setattr(estimate, "available_bytes", lambda: None)  # unknown: not refused
    usage = estimate.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda _: usage)
    assert refused(tmp_path / "b", "BLD-DISK", 7).details["found"] == 1000


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"plugin": "on"}, "no library"),
        ({"plugin": "on", "plugin_library": "missing.so"}, "there is no library"),
        ({"plugin_library": "missing.so"}, "there is no library"),
    ],
)
def test_a_plugin_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], told: str
) -> None:
    monkeypatch.setattr(pipeline, "_missing", lambda *_: "")
    write_engine_bundle(tmp_path / "b")
    assert told in refused(tmp_path / "b", "BLD-PLUGIN", 4, **options).message


def plugin_bundle(out: Path, target: str) -> Bundle:
    """The tiny model, whose decode graph calls MlaDecode."""
    made = exported_checkpoint(TINY, target=target, dtype="fp16", capacity=64)
    shutil.copytree(made.bundle.path, out)
    return open_bundle(out)


@pytest.mark.parametrize(
    ("target", "version", "bare"),
    [("jetson-orin-jp6", "10.3.0.26", True), ("jetson-thor-jp71", "10.13.3.9", True),
     ("jetson-orin-jp7", "10.16.2.1", False)],
)  # fmt: skip
def test_a_plugin_before_the_override_gets_a_graph_without_the_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, version: str, bare: bool
) -> None:
    bundle = plugin_bundle(tmp_path / "b", target)
    for name, value in (("PYTHONPATH", python_path(STAND_IN)), ("STAND_IN_VERSION", version),
                        ("STAND_IN_KEEP", tmp_path / "kept"),
                        ("STAND_IN_RECORD", tmp_path / "record")):  # fmt: skip
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(pipeline.importlib.util, "find_spec", lambda name: object())
    (tmp_path / "lib.so").write_bytes(b"a plugin")
    for mode in ("off", "on"):
        mla_deploy.build(
            bundle.path, plugin=mode, plugin_library=tmp_path / "lib.so", replace=True,
            audit_mode="off",
        )  # fmt: skip
        parsed = onnx.load(tmp_path / "kept", load_external_data=False)  # decode is the last
        names = {function.name for function in parsed.functions}
        assert ("MlaDecode" not in names) == (bare and mode == "on")
        nodes = [*parsed.graph.node, *(n for f in parsed.functions for n in f.node)]
        assert "MlaDecode" in {node.op_type for node in nodes}
        calls = [json.loads(line) for line in (tmp_path / "record").read_text().splitlines()]
        beside = [call for call in calls if call[0] == "beside"][-1]
        weights = {entry.value for t in parsed.graph.initializer for entry in t.external_data
                   if entry.key == "location"}  # fmt: skip
        assert weights and weights <= set(beside)
    assert open_bundle(bundle.path, verify="full").engine is not None


def test_a_graph_that_calls_no_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_missing", lambda *_: "")
    monkeypatch.setattr(pipeline, "require_clean", lambda *_: None)
    write_engine_bundle(tmp_path / "b", target="jetson-orin-jp6", release="10.3")
    (tmp_path / "lib.so").write_bytes(b"")
    options = {"plugin": "on", "plugin_library": tmp_path / "lib.so"}
    assert "calls no MlaDecode" in refused(tmp_path / "b", "BLD-PLUGIN", 4, **options).message
    planned = plan_build(tmp_path / "b")
    assert pipeline._plugin(planned, "auto", tmp_path / "lib.so") is None  # plain operators then


def test_a_node_that_is_the_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the override a graph names the plugin and has no function: with its library it builds,
    without it the linter says no."""
    monkeypatch.setenv("PYTHONPATH", python_path(STAND_IN))
    monkeypatch.setenv("STAND_IN_VERSION", "10.3.0.26")
    monkeypatch.setattr(pipeline.importlib.util, "find_spec", lambda name: object())
    made = chain(("MlaDecode", {"domain": "mla_deploy", "name": "attend"}), opset=20)
    made.graph.initializer.append(weight("unused", 4))
    write_engine_bundle(tmp_path / "b", made, target="jetson-orin-jp6", release="10.3")
    monkeypatch.setattr(lint, "CHECKS", (operators,))
    assert "mla_deploy::MlaDecode" in refused(tmp_path / "b", "BLD-LINT", 4).message
    (tmp_path / "lib.so").write_bytes(b"")
    built = mla_deploy.build(tmp_path / "b", plugin_library=tmp_path / "lib.so")
    assert built.report.version == "10.3.0.26"


def test_a_bundle_that_changed_while_it_was_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_missing", lambda *_: "")
    bundle = write_engine_bundle(tmp_path / "b")
    opened = open_bundle(bundle.path)
    os.utime(tmp_path / "b" / "decode.onnx", ns=(1, 1))
    with pytest.raises(MlaDeployError) as caught:
        mla_deploy.build(opened)
    assert caught.value.code == "BUN-CHANGED"


def test_no_engines_beside_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_missing", lambda *_: "")
    bundle = write_engine_bundle(tmp_path / "b")
    beside = {**bundle.manifest, "in_place": {"files": {}, "bytes": 0}}
    with pytest.raises(MlaDeployError) as caught:
        mla_deploy.build(changed(bundle, manifest=beside))
    assert caught.value.code == "BLD-IN-PLACE"


def test_the_manifest_of_these_tests_is_a_manifest() -> None:
    assert isinstance(manifest()["engine"]["profiles"]["decode"]["batch"], list)
    assert Bundle.__dataclass_fields__["engine"].default is None
