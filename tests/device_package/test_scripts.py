"""The scripts of a device package on a machine with no device, and build.sh with each release."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mla_deploy.device
from mla_deploy.device_package import write_package
from mla_deploy.device_package.build_conf import build_conf, profile_flags
from mla_deploy.rewrite.releases import find_release
from tests.device.cuda_stand_in import model_bundle
from tests.exported import exported

DEVICE = Path(mla_deploy.device.__file__).parent
SHAPES = {"input_ids": ((1, 1), (1, 8), (4, 16)), "c.0": ((1, 1, 9, 3), (1, 1, 9, 3), (4, 1, 9, 3))}
TOOL = """#!/bin/sh
printf '%s\\n' "$@" >>"$RECORD"
for flag in "$@"; do
    case "$flag" in --saveEngine=*) printf plan >"${flag#--saveEngine=}" ;; esac
done
exit ${TOOL_STATUS:-0}
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scripts")
    return write_package(model_bundle(folder / "b"), folder / "p").path


def ran(command: list[str], **more: str) -> Any:
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/", **more}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", ["build.py", "verify.py"])
def test_without_tensorrt_each_refuses_in_one_line(package: Path, script: str) -> None:
    done = ran([sys.executable, "-I", str(package / script)])
    assert (done.returncode, done.stdout) == (7, "")
    assert done.stderr.startswith(f"{script}: no TensorRT found: ") and done.stderr.count("\n") == 1
    assert not (package / "report.json").exists() and not (package / "engines").exists()
    assert ran([sys.executable, "-I", str(package / script), "--help"]).returncode == 0


def test_without_trtexec_build_sh_refuses_in_one_line(package: Path) -> None:
    if shutil.which("trtexec", path="/usr/bin:/bin:/usr/src/tensorrt/bin"):
        pytest.skip("trtexec is here")
    done = ran(["bash", str(package / "build.sh")])
    assert (done.returncode, done.stdout) == (7, "")
    assert done.stderr.startswith("build.sh: no TensorRT found: ") and done.stderr.count("\n") == 1
    assert not (package / "engines").exists()


def test_a_gpu_that_is_not_there(package: Path, tmp_path: Path) -> None:
    """TensorRT is there and no CUDA runtime is: said before anything is loaded."""
    (tmp_path / "tensorrt.py").write_text("class ILogger: pass\n__version__ = '10.16.2'\n")
    if any(Path(name).exists() for name in ("/dev/nvidia0", "/dev/nvhost-gpu")):
        pytest.skip("there is a GPU here")
    done = ran([sys.executable, str(package / "verify.py")], PYTHONPATH=str(tmp_path))
    assert done.returncode == 7 and done.stderr.count("\n") == 1
    assert "no CUDA runtime found" in done.stderr or "no GPU" in done.stderr


@pytest.mark.parametrize("path", sorted(DEVICE.glob("*.py")), ids=lambda path: path.name)
def test_modules_are_python_3_8_of_the_library_and_numpy(path: Path) -> None:
    tree = ast.parse(path.read_text(), feature_version=(3, 8))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [] if node.level == 1 else [str(node.module)]
        else:
            continue
        for name in names:
            library = name.partition(".")[0]
            assert library == "numpy" or library in sys.stdlib_module_names, f"{path}: {name}"


def test_modules_run_on_python_3_8_where_it_is(package: Path) -> None:
    old = shutil.which("python3.8")
    if old is None or ran([old, "-c", "pass"]).returncode != 0:
        pytest.skip("python3.8 is not here")
    done = ran([old, "-m", "compileall", "-q", str(package / "mla_device")])
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)
def test_build_py_with_tensorrt_rtx(tmp_path: Path) -> None:
    """As far as it goes with no GPU: both plans are real, and verify.py has nothing to run them."""
    if any(Path(name).exists() for name in ("/dev/nvidia0", "/dev/nvhost-gpu")):
        pytest.skip("there is a GPU here")
    made = exported("v3-yarn-all-dim", target="rtx-40", dtype="fp16", capacity=64)
    place = write_package(made.bundle, tmp_path / "p", plugin="off").path
    done = ran([sys.executable, str(place / "build.py"), "--workspace", "256"])
    assert done.returncode == 0, done.stderr
    note = json.loads((place / "engines" / "build.json").read_text())
    assert note["package"] == "tensorrt_rtx" and note["version"].startswith("1.7")
    for graph in ("prefill", "decode"):
        plan = (place / "engines" / f"{graph}.plan").read_bytes()
        assert len(plan) == note["plans"][graph]["bytes"] > 100_000
        assert plan[:4] in (b"ptrt", b"vtrt")
    done = ran([sys.executable, str(place / "verify.py")])
    assert done.returncode == 7 and done.stderr.count("\n") == 1
    assert "no GPU" in done.stderr or "no CUDA runtime" in done.stderr


def test_build_sh_is_bash(package: Path) -> None:
    assert ran(["bash", "-n", str(package / "build.sh")]).returncode == 0
    assert ran(["bash", "-n", str(package / "build.conf")]).returncode == 0
    assert os.access(package / "build.sh", os.X_OK)
    checker = shutil.which("shellcheck")
    if checker is not None:
        assert ran([checker, "-e", "SC1091,SC2154", str(package / "build.sh")]).returncode == 0


@pytest.fixture
def place(package: Path, tmp_path: Path) -> Path:
    """A copy of the package, and tools on PATH that note their flags."""
    for name in ("trtexec", "tensorrt_rtx"):
        (tmp_path / name).write_text(TOOL)
        (tmp_path / name).chmod(0o755)
    return Path(shutil.copytree(package, tmp_path / "p"))


def build_sh(place: Path, *arguments: str, **more: str) -> tuple[Any, list[str]]:
    record = place.parent / "record"
    path = f"{place.parent}:/usr/bin:/bin"
    done = ran(["bash", str(place / "build.sh"), *arguments], PATH=path, RECORD=str(record), **more)
    return done, record.read_text().splitlines() if record.exists() else []


@pytest.mark.parametrize(
    ("release", "strong", "streams", "override"),
    [("10.3", True, True, False), ("10.13", True, True, False), ("10.16", True, True, True),
     ("11", False, True, True), ("rtx-1.7", False, False, True)],
)  # fmt: skip
def test_flags_of_each_release(
    place: Path, release: str, strong: bool, streams: bool, override: bool
) -> None:
    conf = build_conf(find_release(release), {"prefill": [SHAPES], "decode": [SHAPES, SHAPES]},
                      weight_streaming=True, has_plugin=True)  # fmt: skip
    (place / "build.conf").write_bytes(conf)
    (place / "lib mla.so").write_bytes(b"")
    done, flags = build_sh(place, "--plugin", "lib mla.so", "--verbose")
    assert done.returncode == 0, done.stderr
    assert (
        flags.count("--onnx=bundle/prefill.onnx") == flags.count("--onnx=bundle/decode.onnx") == 1
    )
    for flag, wanted in (("--stronglyTyped", strong), ("--maxAuxStreams=0", streams),
                         ("--enablePluginOverride", override), ("--skipInference", True),
                         ("--staticPlugins=lib mla.so", True), ("--allowWeightStreaming", True),
                         ("--verbose", True)):  # fmt: skip
        assert flags.count(flag) == (2 if wanted else 0), flag
    assert flags.count("--profile=0") == 2 and flags.count("--profile=1") == 1
    assert flags.count("--minShapes=input_ids:1x1,c.0:1x1x9x3") == 3
    assert flags.count("--optShapes=input_ids:1x8,c.0:1x1x9x3") == 3
    assert flags.count("--maxShapes=input_ids:4x16,c.0:4x1x9x3") == 3
    assert "--fp16" not in flags and "--best" not in flags
    engines = place / "engines"
    assert sorted(os.listdir(engines)) == ["build.json", "decode.log", "decode.plan", "prefill.log",
                                           "prefill.plan"]  # fmt: skip
    note = json.loads((engines / "build.json").read_text())
    assert (note["by"], note["release"]) == ("build.sh", release)
    assert note["tool"] == ("tensorrt_rtx" if release.startswith("rtx") else "trtexec")


def test_build_sh_tells_what_went_wrong(place: Path) -> None:
    done, _ = build_sh(place, TOOL_STATUS="1")
    assert done.returncode == 6 and "engines/prefill.log" in done.stderr
    assert not (place / "engines" / "prefill.plan").exists()
    done, _ = build_sh(place, "--plugin", "lib.so")
    assert done.returncode == 6 and "call no plugin" in done.stderr
    (place / "build.conf").unlink()
    done, _ = build_sh(place)
    assert done.returncode == 5 and "copy the package again" in done.stderr


def test_names_that_bash_would_read() -> None:
    assert profile_flags([{"a": ((1,), (1,), (1,))}])[1] == "--minShapes=a:1"
    conf = build_conf(find_release("11"), {"decode": [{"$(id)": ((1,), (2,), (3,))}]},
                      weight_streaming=False, has_plugin=False)  # fmt: skip
    assert b"'--minShapes=$(id):1'" in conf
