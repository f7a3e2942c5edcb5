"""Writing a device package: refusals that leave nothing, the plugin's files, one rename."""

from __future__ import annotations

import errno
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from mla_deploy.bundle import Bundle
from mla_deploy.bundle.filesystem import FileSystem
from mla_deploy.device.contract import Contract
from mla_deploy.device_package import plugin_files, write, write_package
from mla_deploy.device_package.golden import golden_cases
from mla_deploy.device_package.stage import stage_package
from mla_deploy.errors import MlaDeployError
from tests.device.cuda_stand_in import jetson_bundle, model_bundle
from tests.engine.small_graphs import decode_layer
from tests.exported import exported
from tests.small_bundle import names_in, write_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return jetson_bundle(tmp_path / "b")


def refused(bundle: Any, out: Path, code: str, exit_status: int, **options: Any) -> MlaDeployError:
    before = names_in(out.parent)
    with pytest.raises(MlaDeployError) as caught:
        write_package(bundle, out, **options)
    assert (caught.value.code, caught.value.exit_status) == (code, exit_status), caught.value
    assert names_in(out.parent) == before
    return caught.value


def test_refusals_leave_nothing(bundle: Bundle, tmp_path: Path) -> None:
    write_bundle(tmp_path / "cpu")
    refused(tmp_path / "cpu", tmp_path / "p", "BLD-TARGET", 4)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "engine.plan").write_bytes(b"mine")
    refused(bundle, tmp_path / "there", "BUN-EXISTS", 8)
    assert names_in(tmp_path / "there") == ["engine.plan"]
    with pytest.raises(MlaDeployError) as caught:
        write_package(bundle, tmp_path / "none" / "p")
    assert caught.value.code == "BUN-PARENT"
    refused(bundle, bundle.path / "p", "BUN-OVERLAP", 4)
    refused(bundle, tmp_path / "p", "BLD-PROFILE", 4, profiles=("decode:batch=8..1",))
    error = refused(bundle, tmp_path / "p", "PKG-GOLDEN", 4, profiles=("decode:batch=8..9",))
    assert "--profile" in error.hint
    beside = replace(bundle, manifest={**bundle.manifest, "in_place": {"files": {}, "bytes": 0}})
    refused(beside, tmp_path / "p", "BLD-IN-PLACE", 4)
    other = exported(target="jetson-orin-jp7", dtype="fp16", capacity=64).checkpoint
    refused(bundle, tmp_path / "p", "VAL-SOURCE", 5, source=other)


def test_a_cache_that_engines_do_not_have(bundle: Bundle, tmp_path: Path) -> None:
    cache = json.loads(json.dumps(bundle.manifest["cache"]))
    cache["tensors"][0]["rows"] = "state"
    ring = replace(bundle, manifest={**bundle.manifest, "cache": cache})
    refused(ring, tmp_path / "p", "PKG-CACHE", 6)


def test_the_linter_is_asked(tmp_path: Path) -> None:
    made = decode_layer()
    made.graph.node.append(helper.make_node("BitwiseNot", ["new_lengths"], ["flipped"]))
    refused(jetson_bundle(tmp_path / "b", graph=made), tmp_path / "p", "BLD-LINT", 4)


class Failing(FileSystem):
    """Call number `left` of those that change the disk fails."""

    def __init__(self, left: int) -> None:
        self.left = left

    def _count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    def make_folder(self, path: Path) -> None:
        self._count()
        super().make_folder(path)

    def create(self, path: Path) -> Any:
        self._count()
        return super().create(path)

    def sync(self, descriptor: int) -> None:
        self._count()
        super().sync(descriptor)

    def rename_new(self, source: Path, target: Path) -> None:
        self._count()
        super().rename_new(source, target)


def test_a_disk_that_fails_at_any_call_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "weights").write_bytes(bytes(100))

    def make(left: int) -> None:
        with stage_package(tmp_path / "p", fs=Failing(left)) as stage:
            stage.write("a/b/one", b"1")
            stage.copy("a/two", tmp_path / "in", "weights")
            stage.seal({"format_version": 1})

    failed = 0
    for left in range(1, 40):
        try:
            make(left)
        except MlaDeployError as error:
            assert (error.code, error.exit_status) == ("ENV-DISK", 7)
            assert names_in(tmp_path) == ["in"]
            failed += 1
        else:
            break
    assert failed >= 8
    assert names_in(tmp_path) == ["in", "p"]
    facts = json.loads((tmp_path / "p" / "package.json").read_text())
    sizes = {name: row["bytes"] for name, row in facts["files"].items()}
    assert sizes == {"a/b/one": 1, "a/two": 100}


def with_function(op_type: str = "MlaDecode") -> onnx.ModelProto:
    """A decode layer that calls a function by the plugin's name, to no purpose."""
    made = decode_layer()
    body = helper.make_function("mla_deploy", op_type, ["x", "q", "c"], ["y"],
                                [helper.make_node("Identity", ["x"], ["y"])],
                                [helper.make_opsetid("", 24)], ["scale", "latent"])  # fmt: skip
    made.functions.append(body)
    made.opset_import.append(helper.make_opsetid("mla_deploy", 1))
    made.graph.node.append(
        helper.make_node(op_type, ["new_lengths", "", "latent_cache.0"], ["idle"],
                         domain="mla_deploy", name="mla", scale=0.25, latent=16)
    )  # fmt: skip
    return made


def test_kernels_are_compiled_where_the_graph_calls_the_operator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler is a program of this test's, which notes what it was asked for."""
    (tmp_path / "plugins" / "mla_decode").mkdir(parents=True)
    (tmp_path / "plugins" / "mla_decode" / "plugin.cpp").write_text("// source")
    (tmp_path / "compiler.py").write_text(
        "import sys, pathlib\n"
        "if '--scale=0.25' not in sys.argv: sys.exit('no scale')\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "(out / 'attend.sm87.cubin').write_text(' '.join(sys.argv[3:]))\n"
    )
    monkeypatch.setattr(plugin_files, "_PLUGINS", tmp_path / "plugins")
    monkeypatch.setattr(plugin_files, "_COMPILER", "compiler")
    monkeypatch.setattr(plugin_files.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(write, "golden", lambda *_: write.Golden((), b"", "onnxruntime"))
    called = jetson_bundle(tmp_path / "b", graph=with_function())
    made = write_package(called, tmp_path / "p", plugin="on")
    assert made.plugin.called and made.plugin.kernels == ("attend.sm87.cubin",)
    kernel = (tmp_path / "p" / "plugin" / "kernels" / "attend.sm87.cubin").read_text()
    assert kernel == "--sm 87 --scale=0.25 --latent=16 --rope=8 --dtype=fp16"
    assert (tmp_path / "p" / "plugin" / "mla_decode" / "plugin.cpp").read_text() == "// source"
    assert b"HAS_PLUGIN=yes" in (tmp_path / "p" / "build.conf").read_bytes()
    (tmp_path / "compiler.py").write_text("import sys; sys.exit('no ptxas')")
    error = refused(called, tmp_path / "q", "PKG-KERNELS", 7)
    assert "no ptxas" in error.message
    assert not write_package(called, tmp_path / "r", plugin="off").plugin.source
    plain = jetson_bundle(tmp_path / "c")
    made = write_package(plain, tmp_path / "s")
    assert made.plugin.source and not made.plugin.kernels and "call no" in made.plugin.told
    refused(plain, tmp_path / "t", "BLD-PLUGIN", 4, plugin="on")
    monkeypatch.setattr(plugin_files, "_PLUGINS", tmp_path / "none")
    assert "no source" in write_package(called, tmp_path / "u").plugin.told
    assert sys.executable


def test_golden_cases_fit_the_profiles(bundle: Bundle) -> None:
    def contract(prefill: tuple[int, int], decode: tuple[int, int], tokens: int) -> Contract:
        def shapes(batch: tuple[int, int], width: int) -> Any:
            low, high = batch
            cache = {"min": [low, 1, 64, 24], "opt": [low, 1, 64, 24], "max": [high, 1, 64, 24]}
            return {"input_ids": {"min": [low, 1], "opt": [low, 1], "max": [high, width]},
                    "cache_lengths": {"min": [low], "opt": [low], "max": [high]},
                    "new_lengths": {"min": [low], "opt": [low], "max": [high]},
                    "latent_cache.0": cache}  # fmt: skip

        return Contract(bundle.manifest, {"prefill": [shapes(prefill, tokens)],
                                          "decode": [shapes(decode, 1)]})  # fmt: skip

    cases = golden_cases(contract((1, 4), (1, 4), 32))
    assert [(case.name, case.batch, case.longest) for case in cases] == [
        ("batch-1", 1, 30), ("batch-3", 3, 30), ("prompt-32", 1, 34)]  # fmt: skip
    assert [len(row) for row in cases[1].calls[0].rows] == [17, 5, 1]
    assert [case.name for case in golden_cases(contract((1, 1), (1, 4), 4))] == ["batch-1"]
    assert [case.name for case in golden_cases(contract((2, 2), (1, 4), 8))] == ["batch-2"]
    assert [case.name for case in golden_cases(contract((3, 3), (1, 4), 8))] == ["batch-3"]
    with pytest.raises(MlaDeployError):
        golden_cases(contract((1, 1), (2, 4), 4))


def test_the_model_s_own_package_is_of_the_graphs_without_a_source(tmp_path: Path) -> None:
    made = write_package(model_bundle(tmp_path / "b"), tmp_path / "p")
    assert made.golden_from == "onnxruntime" and made.cases == ("batch-1", "prompt-62")
    assert made.to_dict()["bytes"] == sum(
        path.stat().st_size for path in (tmp_path / "p").rglob("*") if path.is_file()
    )
