"""The TensorRT runner over stand-ins of TensorRT and CUDA that compute.

Equal to ONNX Runtime, caches in place, one CUDA graph for decode; and every refusal comes before
TensorRT is given a plan.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mla_deploy import open_runner
from mla_deploy.bundle import Bundle, open_bundle
from mla_deploy.device.cuda import Cuda
from mla_deploy.device.failure import DeviceFailure
from mla_deploy.device.numbers import relative_l2
from mla_deploy.errors import MlaDeployError
from mla_deploy.runtime import OnnxRunner, Runner
from mla_deploy.trust import remember, trust_folder, trusted_digests
from mla_deploy.validate.stand_in import StandInSessions
from tests.device.cuda_stand_in import (
    cudart,
    deserialised,
    device,
    jetson_bundle,
    model_bundle,
    with_engines,
)

__all__ = ["device"]
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6, 5], [8]]


@pytest.fixture
def bundle(device: Path, tmp_path: Path) -> Bundle:
    """A Jetson bundle of one small layer, with engines that this user trusts."""
    return built(jetson_bundle(tmp_path / "b"))


@pytest.fixture
def model(device: Path, tmp_path: Path) -> Bundle:
    """The same of a real model."""
    return built(model_bundle(tmp_path / "m"))


def built(bundle: Bundle) -> Bundle:
    found = with_engines(bundle)
    assert found.engine is not None
    remember(found.engine.digest, "built")
    return found


def on_cpu(bundle: Bundle, batch: int) -> OnnxRunner:
    return OnnxRunner(StandInSessions(bundle), batch=batch, capacity=64)


def same(found: Any, wanted: Any) -> None:
    """In fp16 another graph (the CPU's runner may take the absorbed one) rounds otherwise."""
    assert relative_l2(wanted, found) < 1e-2  # the gate of fp16


def test_equal_to_the_graphs_on_onnx_runtime(model: Bundle, device: Path) -> None:
    live, _ = cuda_counts()
    runner = open_runner(model, runtime="tensorrt", batch=3, chunk=4)
    assert isinstance(runner, Runner)
    assert (runner.batch, runner.capacity, runner.vocab_size) == (
        3,
        64,
        model.manifest["model"]["vocab_size"],
    )
    assert runner.cache_bytes == 3 * 64 * int(model.manifest["cache"]["bytes_per_token"])
    cpu = on_cpu(model, 3)
    for _ in range(2):  # the second time in caches that hold what the first left
        same(runner.prefill(PROMPTS), cpu.prefill(PROMPTS))
        for step in range(6):
            tokens = [step, step + 7, 31 - step]
            same(runner.decode(tokens), cpu.decode(tokens))
        assert runner.lengths.tolist() == cpu.lengths.tolist() == [13, 8, 7]
        assert runner.cache_layers == cpu.cache_layers
        for layer in cpu.cache_layers:
            for row in range(3):
                same(runner.cached_rows(layer, row), cpu.cached_rows(layer, row))
        runner.reset()
        cpu.reset()
    assert deserialised(device) == 4  # twice in the child that tries them first, twice here
    again = open_runner(model, runtime="tensorrt")
    assert deserialised(device) == 6  # tried once a machine
    again.close()
    runner.close()
    assert cuda_counts()[0] == live


def cuda_counts() -> tuple[int, int]:
    """(allocations that live, graphs launched) of the stand-in of CUDA."""
    library = ctypes.CDLL(str(cudart()))
    return library.stand_in_live(), library.stand_in_launches()


def test_a_decode_step_is_recorded_once(model: Bundle) -> None:
    runner, cpu = open_runner(model, runtime="tensorrt"), on_cpu(model, 1)
    for one in (runner, cpu):
        one.prefill([PROMPTS[0]])
    launched = cuda_counts()[1]
    for step in range(5):
        same(runner.decode([step]), cpu.decode([step]))
    assert runner.is_recorded
    assert cuda_counts()[1] == launched + 4  # the first step runs plainly
    same(runner.prefill([[1] * 9]), cpu.prefill([[1] * 9]))
    same(runner.decode([9]), cpu.decode([9]))


@pytest.mark.parametrize(("how", "plain"), [("copies caches", 1), ("compiles late", 3)])
def test_engines_that_do_not_work_in_place_or_at_once(
    model: Bundle, monkeypatch: pytest.MonkeyPatch, how: str, plain: int
) -> None:
    """Caches change places with every step, and each place is recorded."""
    monkeypatch.setenv("STAND_IN_MODE", how)
    runner, cpu = open_runner(model, runtime="tensorrt", batch=2), on_cpu(model, 2)
    for one in (runner, cpu):
        one.prefill([[7, 3, 5, 1], [2, 2]])
    launched = cuda_counts()[1]
    for step in range(6):
        same(runner.decode([step, 9]), cpu.decode([step, 9]))
    assert cuda_counts()[1] == launched + 6 - plain
    same(runner.prefill([[1] * 9, [4]]), cpu.prefill([[1] * 9, [4]]))
    for step in range(3):
        same(runner.decode([step, 9]), cpu.decode([step, 9]))
    for row in range(2):
        same(runner.cached_rows(1, row), cpu.cached_rows(1, row))
    assert runner.cache_bytes == 2 * 64 * int(model.manifest["cache"]["bytes_per_token"])


def test_decode_runs_plainly_where_recording_is_refused(model: Bundle) -> None:
    library = ctypes.CDLL(str(cudart()))
    library.stand_in_refuse_capture(1)
    try:
        runner, cpu = open_runner(model, runtime="tensorrt"), on_cpu(model, 1)
        for one in (runner, cpu):
            one.prefill([[2, 3]])
        for step in range(3):
            same(runner.decode([step]), cpu.decode([step]))
        assert not runner.is_recorded
    finally:
        library.stand_in_refuse_capture(0)


def test_guards_change_nothing(model: Bundle) -> None:
    runner = open_runner(model, runtime="tensorrt", batch=2)
    runner.prefill([[1, 2, 3], [4]])
    before = runner.cached_rows(0, 0)
    for call, code in (
        (lambda: runner.prefill([[1]]), "RUN-BATCH"),
        (lambda: runner.prefill([[], [1]]), "RUN-EMPTY"),
        (lambda: runner.decode([1, model.manifest["model"]["vocab_size"]]), "RUN-TOKEN"),
        (lambda: runner.prefill([[1] * 62, [1]]), "RUN-OVERFLOW"),
    ):
        with pytest.raises(MlaDeployError) as caught:
            call()
        assert caught.value.code == code
    assert runner.lengths.tolist() == [3, 1]
    np.testing.assert_array_equal(runner.cached_rows(0, 0), before)


def test_nan_is_refused_when_asked(model: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = open_runner(model, runtime="tensorrt", check_finite=True)
    monkeypatch.setenv("STAND_IN_MODE", "gives NaN")
    with pytest.raises(MlaDeployError) as caught:
        runner.prefill([[1, 2]])
    assert (caught.value.code, caught.value.exit_status) == ("RUN-NONFINITE", 3)
    assert runner.lengths.tolist() == [0]


def refused(bundle: Bundle | Path, code: str, exit_status: int, **options: Any) -> MlaDeployError:
    with pytest.raises(MlaDeployError) as caught:
        open_runner(bundle, runtime="tensorrt", **options)
    assert (caught.value.code, caught.value.exit_status) == (code, exit_status), caught.value
    return caught.value


def changed(**changes: Any) -> Callable[[Bundle], Bundle]:
    """engine.json with members changed and sealed again, and trusted: the next line of defence."""

    def change(bundle: Bundle) -> Bundle:
        made = with_engines(bundle, **changes)
        assert made.engine is not None
        remember(made.engine.digest, "trusted")
        return made

    return change


def other_profiles(bundle: Bundle) -> Bundle:
    assert bundle.engine is not None
    graphs = json.loads(json.dumps(bundle.engine.facts["graphs"]))
    graphs["decode"]["profiles"][0]["shapes"]["latent_cache.0"]["max"][2] = 128
    return changed(graphs=graphs)(bundle)


def version(text: str) -> dict[str, Any]:
    return {"runtime": {"package": "tensorrt", "version": text}}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (changed(**version("11.0.0")), "tensorrt 11.0.0, here is 10.16.2.1"),
        (changed(**version("10.13.2.1")), "10.13.2.1"),
        (changed(**version("10.16.2.2")), "10.16.2.2"),
        (changed(sms=["11.0"]), "SM 11.0, here is 8.7"),
        (changed(device={"name": "Orin Nano"}), "'Orin Nano', here is 'Stand-in GPU'"),
        (changed(device={"multiprocessors": 8}), "multiprocessors '8', here is '16'"),
    ],
    ids=["major", "minor", "patch", "sm", "name", "multiprocessors"],
)
def test_engines_of_another_machine(
    bundle: Bundle, device: Path, change: Callable[[Bundle], Bundle], told: str
) -> None:
    error = refused(change(bundle), "ENG-MACHINE", 6)
    assert told in error.message and "--replace" in error.hint
    assert deserialised(device) == 0


def test_every_difference_is_listed(bundle: Bundle, device: Path) -> None:
    made = changed(sms=["9.0"], device={"name": "H100"}, **version("10.0.0"))(bundle)
    assert len(refused(made, "ENG-MACHINE", 6).details["differences"]) == 3
    assert deserialised(device) == 0


def test_profiles_that_are_not_of_these_graphs(bundle: Bundle, device: Path) -> None:
    error = refused(other_profiles(bundle), "ENG-RECORD", 5)
    assert "1..128" in error.message or "128 for 64" in error.message
    refused(changed(graphs={"prefill": {}, "decode": {}})(bundle), "ENG-RECORD", 5)
    assert deserialised(device) == 0


def test_engines_that_nobody_vouches_for(bundle: Bundle, device: Path) -> None:
    made = with_engines(bundle, note="built elsewhere")
    assert made.engine is not None
    error = refused(made, "ENG-TRUST", 5)
    assert made.engine.digest in error.message and f"--trust {made.engine.digest}" in error.hint
    refused(made, "ENG-TRUST", 5, trust=("0" * 64,))
    refused(made, "ENG-DIGEST", 4, trust=("built by a friend",))
    assert deserialised(device) == 0
    open_runner(made, runtime="tensorrt", trust=(made.engine.digest.upper(),)).close()
    assert trusted_digests()[made.engine.digest] == {"trusted", "loaded"}
    open_runner(made, runtime="tensorrt").close()  # said once


def test_a_list_that_others_may_write_counts_nothing(bundle: Bundle, device: Path) -> None:
    (trust_folder() / "trusted").chmod(0o666)
    error = refused(bundle, "ENG-TRUST-LIST", 5)
    assert "chmod" in error.hint
    assert deserialised(device) == 0


def test_no_engines(bundle: Bundle, device: Path) -> None:
    refused(open_bundle(bundle.path, engine=False), "ENG-MISSING", 4)
    with pytest.raises(MlaDeployError) as caught:
        open_runner(bundle, runtime="tensorrt", capacity=8)  # type: ignore[call-overload]
    assert caught.value.code == "RUN-RUNTIME"
    assert deserialised(device) == 0


def test_more_rows_than_a_profile_takes(bundle: Bundle, device: Path) -> None:
    assert "profile" in refused(bundle, "RUN-BATCH", 4, batch=5).message
    assert deserialised(device) == 0


def test_a_flipped_bit_in_a_plan(bundle: Bundle, device: Path) -> None:
    """Any of 100: found when the bundle is opened, or if that looked at sizes, before the load."""
    generator = np.random.default_rng(11)
    for turn in range(100):
        path = bundle.path / "engine" / f"{('prefill', 'decode')[turn % 2]}.plan"
        whole = path.read_bytes()
        data = bytearray(whole)
        data[generator.integers(len(data))] ^= 1 << generator.integers(8)
        path.write_bytes(bytes(data))
        assert refused(bundle.path, "BUN-HASH", 5).details["file"].startswith("engine/")
        refused(bundle.path, "BUN-HASH", 5, verify="sizes")
        path.write_bytes(whole)
    for cut in (b"", whole[:-1], whole + b" "):
        path.write_bytes(cut)
        refused(bundle.path, "BUN-SIZE", 5, verify="sizes")
    assert deserialised(device) == 0


def test_a_plan_that_changes_after_it_was_opened(bundle: Bundle, device: Path) -> None:
    path = bundle.path / "engine" / "prefill.plan"
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    refused(bundle, "ENG-LOAD", 5)
    assert bundle.engine is not None
    remember(bundle.engine.digest, "loaded")
    refused(bundle, "BUN-HASH", 5)
    assert deserialised(device) == 0


def test_engines_of_another_bundle(bundle: Bundle, device: Path, tmp_path: Path) -> None:
    other = jetson_bundle(tmp_path / "c", crossover_tokens=7.0)
    os.rename(bundle.path / "engine", other.path / "engine")
    refused(other.path, "BUN-ENGINE", 5)
    assert deserialised(device) == 0


def test_no_gpu_and_no_library(
    bundle: Bundle, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_NO_GPU", "1")
    assert "no GPU" in refused(bundle, "ENG-RUNTIME", 7).message
    other = changed(runtime={"package": "tensorrt_of_tomorrow", "version": "1"})(bundle)
    assert "no TensorRT found" in refused(other, "ENG-RUNTIME", 7).message
    assert deserialised(device) == 0


def test_the_plugin_is_the_one_it_was_built_with(bundle: Bundle, device: Path) -> None:
    library = bundle.path.parent / "libmla.so"
    library.write_bytes(b"right")
    wanted = hashlib.sha256(b"right").hexdigest()
    made = changed(options={"plugin": {"file": "libmla.so", "sha256": wanted}})(bundle)
    assert "none is given" in refused(made, "ENG-PLUGIN", 5).message
    library.write_bytes(b"wrong")
    refused(made, "ENG-PLUGIN", 5, plugin_library=library)
    assert deserialised(device) == 0
    assert not device.exists() or "load_library" not in device.read_text()
    library.write_bytes(b"right")
    open_runner(made, runtime="tensorrt", plugin_library=library).close()
    assert "libmla.so" in device.read_text()


def test_a_plan_that_kills_its_process(
    bundle: Bundle, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a right record: the child dies, this process does not."""
    monkeypatch.setenv("STAND_IN_MODE", "aborts")
    assert "signal 6" in refused(bundle, "ENG-LOAD", 5).message
    assert deserialised(device) == 1
    assert bundle.engine is not None
    assert "loaded" not in trusted_digests()[bundle.engine.digest]


def test_a_cache_that_engines_do_not_have(bundle: Bundle, device: Path) -> None:
    cache = json.loads(json.dumps(bundle.manifest["cache"]))
    cache["tensors"][0]["rows"] = "state"
    refused(replace(bundle, manifest={**bundle.manifest, "cache": cache}), "ENG-CACHE", 6)
    assert deserialised(device) == 0


def test_a_plugin_library_that_registers_nothing(bundle: Bundle, device: Path) -> None:
    library = bundle.path.parent / "empty.so"
    library.write_bytes(b"")
    wanted = hashlib.sha256(b"").hexdigest()
    made = changed(options={"plugin": {"file": "empty.so", "sha256": wanted}})(bundle)
    assert "registers no plugin" in refused(made, "ENG-RUNTIME", 7, plugin_library=library).message
    assert deserialised(device) == 0


def test_a_step_that_fails_leaves_the_lengths(
    model: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = open_runner(model, runtime="tensorrt")
    runner.prefill([[1, 2, 3]])

    def refuse(*_: Any) -> None:
        raise DeviceFailure("environment", "cudaStreamSynchronize: unspecified launch failure")

    with monkeypatch.context() as broken, pytest.raises(MlaDeployError) as caught:
        broken.setattr(Cuda, "wait", refuse)
        runner.decode([4])
    assert (caught.value.code, caught.value.exit_status) == ("ENG-STEP", 7)
    assert runner.lengths.tolist() == [3]
    same(runner.decode([4]), on_cpu_after(model, [1, 2, 3], 4))


def on_cpu_after(bundle: Bundle, prompt: list[int], token: int) -> Any:
    cpu = on_cpu(bundle, 1)
    cpu.prefill([prompt])
    return cpu.decode([token])


def test_engines_with_other_tensors(
    bundle: Bundle, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_MODE", "lacks an output")
    assert "no output latent_cache_out.0" in refused(bundle, "ENG-IO", 5).message


def test_a_list_that_cannot_be_written_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    assert remember("0" * 64, "built") is False
