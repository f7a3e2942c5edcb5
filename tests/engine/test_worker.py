"""The build worker and its parent: every way a child can end; `tensorrt` through a stand-in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mla_deploy.engine.build_graph import build_engine
from mla_deploy.engine.request import BuildRequest
from mla_deploy.engine.supervise import run_worker
from mla_deploy.errors import EnvironmentFailure, IncompatibleError, InputError, MlaDeployError
from tests.engine.small_graphs import chain, decode_layer, saved
from tests.tensorrt_names import python_path

STAND_IN = Path(__file__).with_name("stand_in")
ONE = {"x": ((1, 16), (2, 16), (4, 16))}


@pytest.fixture
def request_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuildRequest:
    """A request to the stand-in of `tensorrt`, which records what it is told."""
    monkeypatch.setenv("PYTHONPATH", python_path(STAND_IN))
    monkeypatch.setenv("STAND_IN_RECORD", str(tmp_path / "record"))
    path = saved(chain(("Relu", {})), tmp_path)
    return BuildRequest("tensorrt", "10.16", str(path), str(tmp_path / "decode.plan"), ("8.7",),
                        (ONE, ONE))  # fmt: skip


def recorded(tmp_path: Path) -> list[list[Any]]:
    return [json.loads(line) for line in (tmp_path / "record").read_text().splitlines()]


def failure(request: BuildRequest, **options: Any) -> MlaDeployError:
    with pytest.raises(MlaDeployError) as caught:
        build_engine(request, ["one", "two"], **options)
    return caught.value


def test_the_calls_that_tensorrt_gets(request_: BuildRequest, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    wanted = replace(request_, weight_streaming=True, plugin_library="/lib/libmla.so")
    built = build_engine(wanted, ["one", "two"], progress=lambda *step: steps.append(step))
    shapes = ["set_shape", "x", [1, 16], [2, 16], [4, 16]]
    assert recorded(tmp_path) == [
        ["load_library", "libmla.so"],
        ["create_network", 2],
        ["set_parser_flag", "ENABLE_PLUGIN_OVERRIDE"],
        ["parse_from_file", "decode.onnx"],
        ["config.max_aux_streams", 0],
        ["config.profiling_verbosity", "DETAILED"],
        ["set_flag", "WEIGHT_STREAMING"],
        ["set_preview_feature", "ALIASED_PLUGIN_IO_10_03", True],
        ["config.progress_monitor", "Monitor"],
        shapes,
        ["add_optimization_profile"],
        shapes,
        ["add_optimization_profile"],
        ["deserialize_cuda_engine", 4096],
    ]
    assert steps[-1] == ("Building engine", 1, 2)
    report = built.report
    assert (built.version, report.plan_bytes, report.weights_bytes) == ("10.16.2.1", 4096, 2048)
    assert [profile.activation_bytes for profile in report.profiles] == [1000, 1001]
    assert [[k.name for k in p.kernels] for p in report.profiles] == [["one"], ["two [profile 1]"]]
    assert report.profiles[0].kernels[0].outputs == ((1, 4),)
    assert (report.layers, report.warnings) == ({"MATRIX_MULTIPLY": 2}, ("a warning",))
    assert Path(request_.plan).read_bytes() == bytes(4096)


@pytest.mark.parametrize(
    ("mode", "signal_name", "said"),
    [("aborts", "SIGABRT", "std::bad_alloc"), ("is killed", "SIGKILL", ""), ("exits", "", "")],
)
def test_a_crash_is_told(
    request_: BuildRequest, monkeypatch: pytest.MonkeyPatch, mode: str, signal_name: str, said: str
) -> None:
    monkeypatch.setenv("STAND_IN_MODE", mode)
    error = failure(request_)
    assert (error.code, error.exit_status) == ("BLD-CRASH", 7)
    assert signal_name in error.message and "'Building engine'" in error.message
    assert said in error.message
    assert error.details["peak_host_bytes"] > 1 << 20
    assert not Path(request_.plan).exists()


def test_a_build_that_hangs_is_stopped(
    request_: BuildRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_MODE", "hangs")
    started = time.monotonic()
    error = failure(request_, timeout=3.0)
    assert (error.code, error.exit_status) == ("BLD-TIMEOUT", 7)
    assert time.monotonic() - started < 20
    assert "--timeout" in error.hint


def test_prints_of_native_code_change_nothing(
    request_: BuildRequest, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STAND_IN_MODE", "prints")
    assert run_worker(request_)["plan_bytes"] == 4096
    assert capfd.readouterr().out == ""


def test_refusals_of_the_builder(request_: BuildRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_MODE", "refuses")
    error = failure(request_)
    assert (error.code, error.exit_status) == ("BLD-BUILD", 6)
    assert "nobody knows why" in error.message and "Error Code" not in error.message
    monkeypatch.setenv("STAND_IN_MODE", "raises")
    error = failure(request_)
    assert isinstance(error, IncompatibleError) and "out of luck" in error.message
    bad = {"x": ((4, 16), (4, 16), (1, 16))}
    error = failure(replace(request_, profiles=(ONE, bad)))
    assert error.code == "BLD-PROFILE" and "profile 1" in error.message


def test_a_plugin_library_that_registers_nothing(request_: BuildRequest) -> None:
    error = failure(replace(request_, plugin_library="/lib/libempty.so"))
    assert isinstance(error, InputError) and error.code == "BLD-PLUGIN"


@pytest.mark.parametrize(
    ("release", "version", "fits"),
    [("10.3", "10.3.0.26", True), ("10.3", "10.13.2", False), ("10.13", "10.3.0", False),
     ("11", "11.4.0", True), ("11", "10.16.2", False)],
)  # fmt: skip
def test_the_release_must_be_the_one_of_the_graphs(
    request_: BuildRequest, monkeypatch: pytest.MonkeyPatch, release: str, version: str, fits: bool
) -> None:
    monkeypatch.setenv("STAND_IN_VERSION", version)
    asked = replace(request_, release=release)
    if fits:
        assert build_engine(asked, ["one", "two"]).version == version
    else:
        error = failure(asked)
        assert (error.code, error.exit_status) == ("BLD-VERSION", 6)
        assert version in error.message and release in error.message


def test_a_library_that_cannot_be_loaded(
    request_: BuildRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tensorrt.py").write_text("import libnvinfer_of_another_machine\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    error = failure(request_)
    assert isinstance(error, EnvironmentFailure) and error.code == "BLD-RUNTIME"
    assert "libnvinfer_of_another_machine" in error.message


def test_nothing_of_the_current_folder_is_imported(
    request_: BuildRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if sys.version_info < (3, 11):
        pytest.skip("PYTHONSAFEPATH is of Python 3.11")
    (tmp_path / "json.py").write_text("raise SystemExit(9)\n")
    monkeypatch.chdir(tmp_path)
    assert run_worker(request_)["ok"]


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def _gone(pid: int) -> bool:
    """Ended, whether or not somebody has asked for its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def _wait(condition: Any, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_the_child_goes_with_its_parent(
    request_: BuildRequest, monkeypatch: pytest.MonkeyPatch, number: int, tmp_path: Path
) -> None:
    monkeypatch.setenv("STAND_IN_MODE", "hangs")
    root = str(Path(__file__).parents[2])
    code = (
        "import signal, sys; sys.path.insert(0, sys.argv[1])\n"
        # A shell's background job would have it ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from mla_deploy.engine.request import BuildRequest\n"
        "from mla_deploy.engine.supervise import run_worker\n"
        "run_worker(BuildRequest.from_json(sys.argv[2].encode()), "
        "progress=lambda stage, *_: print(stage, flush=True))\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, root, request_.to_json().decode()],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    with parent:
        assert parent.stdout is not None
        assert any("Building" in line for line in parent.stdout)
        (child,) = _children(parent.pid)
        os.kill(parent.pid, number)
        assert _wait(lambda: _gone(child))
        parent.wait(20)


def test_an_exception_of_ours_ends_the_child(
    request_: BuildRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_MODE", "hangs")
    seen: list[int] = []

    def stop(stage: str, done: int, total: int) -> None:
        if stage.startswith("Building"):
            seen.extend(_children(os.getpid()))
            raise KeyboardInterrupt

    assert threading.current_thread() is threading.main_thread()
    with pytest.raises(KeyboardInterrupt):
        run_worker(request_, progress=stop)
    assert seen and all(_gone(child) for child in seen)


def test_a_real_engine_with_two_profiles_and_several_gpus(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")

    def profile(batch: int, tokens: int) -> Any:
        cache = ((1, 1, 64, 24), (batch, 1, 64, 24), (batch, 1, 64, 24))
        return {"input_ids": ((1, 1), (batch, tokens), (batch, tokens)),
                "cache_lengths": ((1,), (batch,), (batch,)),
                "new_lengths": ((1,), (batch,), (batch,)), "latent_cache.0": cache}  # fmt: skip

    path = saved(decode_layer(), tmp_path)
    sms = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
    request = BuildRequest("tensorrt_rtx", "rtx-1.7", str(path), str(tmp_path / "d.plan"), sms,
                           (profile(1, 1), profile(4, 8)))  # fmt: skip
    report = build_engine(request, ["small", "large"]).report
    assert report.layers["KV_CACHE_UPDATE"] == 1
    assert report.plan_bytes == (tmp_path / "d.plan").stat().st_size > 100_000
    small, large = report.profiles
    assert 8_000_000 < small.activation_bytes < large.activation_bytes < 9_000_000  # type: ignore[operator]
    assert any(kernel.type == "gemm" for kernel in small.kernels) and large.kernels
    assert any((1, 1, 64, 24) in kernel.inputs for kernel in small.kernels)
    assert report.peak_host_bytes > 100 << 20
    assert any("new_lengths" in warning for warning in report.warnings)  # the graph reads it not


def test_a_second_plan_does_not_overwrite_the_first(request_: BuildRequest) -> None:
    Path(request_.plan).write_bytes(b"kept")
    error = failure(request_)
    assert "FILE-EXISTS" in error.message
    assert Path(request_.plan).read_bytes() == b"kept"
