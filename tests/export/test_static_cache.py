"""An int8 latent cache with static scales, for TensorRT: scales, graphs, engines, refusals."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mla_deploy
from mla_deploy import build
from mla_deploy.bundle import Bundle, open_bundle
from mla_deploy.checkpoint import open_checkpoint
from mla_deploy.errors import InputError
from mla_deploy.export.requantize import quantize
from mla_deploy.runtime import OnnxRunner, open_runner
from mla_deploy.runtime.torch_runner import TorchRunner
from mla_deploy.text_file import sample_text
from mla_deploy.trust import remember
from mla_deploy.validate import validate
from mla_deploy.validate.cases import continued_case
from mla_deploy.validate.loss_check import measure_loss
from mla_deploy.validate.stand_in import StandInSessions
from tests.device.cuda_stand_in import device, with_engines
from tests.export.shared_runner import CAPACITY, GRAPHS, ids, open_poisoned
from tests.exported import TINY, exported_checkpoint
from tests.families import write_family
from tests.tiny import write_preset

__all__ = ["device"]
STATIC = {"cache_dtype": "int8-static", "capacity": CAPACITY}
real = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)


def made(target: str = "rtx-40", dtype: str = "fp16", **options: Any) -> Bundle:
    """Of the trained model, which has a tokenizer."""
    return exported_checkpoint(TINY, target=target, dtype=dtype, **{**STATIC, **options}).bundle


def scales_of(bundle: Bundle) -> dict[int, Any]:
    return {
        t["layer"]: np.array(t["scales"], np.float32)
        for t in bundle.manifest["cache"]["tensors"]
        if "scales" in t
    }


def relative(found: Any, wanted: Any) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_the_manifest_says_what_is_cached() -> None:
    bundle = made()
    cache = bundle.manifest["cache"]
    assert (cache["dtype"], cache["layout"]) == ("int8-static", "split")
    kinds = [(t["kind"], t["dtype"], t["elements"]) for t in cache["tensors"][:2]]
    assert kinds == [("latent_cache", "int8", 64), ("rope_key_cache", "fp16", 16)]
    assert cache["bytes_per_token"] == 4 * (64 + 2 * 16)
    assert cache["store"]["name"] == "int8-static" and cache["store"]["tiles"] == 0
    assert cache["store"]["calibration"]["tokens"] >= 2048
    assert bundle.manifest["rewrite"]["decode"]["lower_static_update"] == 4
    assert bundle.manifest["rewrite"]["decode"]["to_mla_decode"] == 0


def test_graph_and_manifest_have_the_same_scales() -> None:
    import onnx
    from onnx import numpy_helper

    bundle = made()
    for graph in GRAPHS:
        model = onnx.load(str(bundle.graph(graph)), load_external_data=False)
        found = {t.name: t for t in model.graph.initializer if t.name.startswith("latent_scale.")}
        assert len(found) == 4
        for layer, scales_L in scales_of(bundle).items():
            stored = numpy_helper.to_array(found[f"latent_scale.{layer}"])
            assert stored.dtype == np.float16 and stored.min() >= 2.0**-14
            np.testing.assert_array_equal(stored.astype(np.float32), scales_L)
        taken = {i for n in model.graph.node if n.op_type == "QuantizeLinear" for i in n.input}
        assert set(found) <= taken


def test_scales_are_the_largest_values_of_the_text(tmp_path: Path) -> None:
    """Of the same tokens the source caches nothing beyond 127 scales, and in each channel that."""
    words = tmp_path / "text.txt"
    words.write_text(sample_text()[:9000])
    bundle = mla_deploy.export(TINY, tmp_path / "b", target="rtx-40", calibrate=words, **STATIC)
    from tokenizers import Tokenizer

    found = Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(words.read_text()).ids
    rows = torch.tensor(found[: len(found) // 256 * 256]).view(-1, 256)
    peaks: dict[int, Any] = {}
    with open_checkpoint(TINY) as checkpoint:
        runner = TorchRunner(checkpoint, 1)
        for row in rows:
            runner.reset()
            runner.prefill([row.tolist()])
            for layer in runner.cache_layers:
                seen = np.abs(runner.cached_rows(layer, 0)[:, :64]).max(0)
                peaks[layer] = np.maximum(peaks.get(layer, 0), seen)
    for layer, scales_L in scales_of(bundle).items():
        np.testing.assert_allclose(scales_L * 127, peaks[layer], rtol=2e-3)


@pytest.mark.parametrize("dtype", ["fp16", "fp32", "bf16"])
@pytest.mark.parametrize("target", ["rtx-40", "jetson-orin-jp6"])
def test_equal_to_the_source_that_rounds_alike(target: str, dtype: str) -> None:
    """Chunks, ragged rows, an idle row, steps; slots that were never written hold other numbers."""
    if target == "jetson-orin-jp6" and dtype == "bf16":
        with pytest.raises(InputError, match="TARGET-DTYPE"):
            made(target, dtype)
        return
    bundle = made(target, dtype)
    bound = {"fp32": 1e-2, "fp16": 1e-2, "bf16": 4e-2}[dtype]
    sessions = StandInSessions(bundle, threads=1)
    calls: list[list[Any]] = [
        [ids(17), ids(2, 1), None],
        [[3], None, ids(9, 2)],
        *([[s], [s + 1], [s]] for s in (4, 5)),
    ]
    with open_checkpoint(TINY) as checkpoint:
        source = TorchRunner(checkpoint, 3)
        source.store_as(dtype, cache_dtype="int8-static", scales=scales_of(bundle))
        for graph in GRAPHS:
            source.reset()
            runner = open_poisoned(sessions, 3, graph, chunk=8)
            for rows in calls:
                wanted, found = source.prefill(rows), runner.prefill(rows)
                asked = [row is not None for row in rows]
                assert relative(found[asked], wanted[asked]) < 5 * bound
            for layer in runner.cache_layers:
                for row in range(3):
                    wanted = source.cached_rows(layer, row)
                    assert relative(runner.cached_rows(layer, row), wanted) < bound


def test_validated_and_its_loss_within_the_gate_of_int8() -> None:
    cases = [continued_case("steps", ids(9), ids(4, 1))]
    report = validate(made(), source=TINY, cases=cases, threads=1)
    assert report.passed
    with open_checkpoint(TINY) as checkpoint:
        loss = measure_loss(made(capacity=256), checkpoint, threads=1)
    assert loss["gates"]["mean_kl"] == 5e-3 and loss["failures"] == []
    assert 1e-6 < loss["mean_kl"] < 1e-3


@real
@pytest.mark.parametrize("target", ["rtx-40", "rtx-50"])
def test_engines_build_and_pass_the_audit(target: str, tmp_path: Path) -> None:
    bundle = mla_deploy.export(TINY, tmp_path / "b", target=target, dtype="fp16", **STATIC)
    report = build(bundle).report
    assert {graph.graph for graph in report.graphs} == {"prefill", "decode"}
    for graph in report.graphs:
        assert graph.layers["QUANTIZE"] == 4
        assert graph.layers["KV_CACHE_UPDATE"] == 4  # rope keys
    assert open_bundle(bundle.path).engine is not None


def test_the_runner_of_engines_holds_the_codes(device: Path, tmp_path: Path) -> None:
    """Codes in two buffers that change places, rope keys in place; equal to the CPU."""
    shutil.copytree(made("jetson-orin-jp7").path, tmp_path / "m")
    bundle = with_engines(open_bundle(tmp_path / "m"))
    assert bundle.engine is not None
    remember(bundle.engine.digest, "built")
    runner = open_runner(bundle, runtime="tensorrt", batch=3, chunk=4)
    cpu = OnnxRunner(StandInSessions(bundle), batch=3, capacity=CAPACITY)
    assert runner.cache_bytes == 3 * CAPACITY * bundle.manifest["cache"]["bytes_per_token"]
    assert not runner._model.in_place
    prompts = [ids(7), ids(2, 1), ids(1, 2)]
    assert relative(runner.prefill(prompts), cpu.prefill(prompts)) < 1e-2
    for step in range(4):
        tokens = [step, step + 7, 31 - step]
        assert relative(runner.decode(tokens), cpu.decode(tokens)) < 1e-2
    for layer in cpu.cache_layers:
        found, wanted = runner.cached_rows(layer, 0), cpu.cached_rows(layer, 0)
        assert found.shape == (11, 80) and relative(found, wanted) < 1e-2
    runner.close()


@pytest.mark.parametrize(
    ("family", "named"),
    [
        ("deepseek_v32", "indexer keys"),
        ("mistral_large4", "latents that several layers read"),
        ("dots3_note_text", "a ring of"),
        ("longcat_flash", "2 latents a layer"),
        ("kimi_linear", "recurrent states"),
    ],
)
def test_caches_of_other_kinds_are_named(family: str, named: str, tmp_path: Path) -> None:
    folder = write_family(tmp_path / "checkpoint", family)
    with pytest.raises(InputError) as refusal:
        mla_deploy.export(folder, tmp_path / "b", target="rtx-40", **STATIC)
    assert refusal.value.code == "EXP-CACHE" and named in refusal.value.message
    assert not (tmp_path / "b").exists()


def test_a_cpu_says_int8(tmp_path: Path) -> None:
    folder = write_preset(tmp_path / "checkpoint", "v3-all-dense")
    with pytest.raises(InputError, match="TARGET-FORM") as refusal:
        mla_deploy.export(folder, tmp_path / "b", cache_dtype="int8-static")
    assert "int8," in str(refusal.value.hint)
    float_bundle = mla_deploy.export(folder, tmp_path / "float")
    with pytest.raises(InputError):
        quantize(float_bundle, tmp_path / "q", cache_dtype="int8-static")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "latent_cache_dtype": "int8-static"}))
    with pytest.raises(InputError, match="CFG-"):
        mla_deploy.export(folder, tmp_path / "b")


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_a_text_and_a_tokenizer_are_needed(has_tokenizer: bool, tmp_path: Path) -> None:
    folder = write_preset(tmp_path / "checkpoint", "v3-all-dense", tokenizer=has_tokenizer)
    short = tmp_path / "short.txt"
    short.write_text("Too few words.")
    for calibrate in (None, short) if not has_tokenizer else (short,):
        with pytest.raises(InputError) as refusal:
            mla_deploy.export(
                folder, tmp_path / "b", target="rtx-40", calibrate=calibrate, **STATIC
            )
        assert refusal.value.code == "QNT-TEXT"
        assert ("tokenizer.json" in refusal.value.message) != has_tokenizer


@pytest.mark.parametrize("layout", ["fused", "split"])
def test_layouts(layout: str, tmp_path: Path) -> None:
    """Apart is what it is; one row is refused, as an option that is not there."""
    options: dict[str, Any] = {"cache_layout": layout, "target": "rtx-40", **STATIC}
    if layout == "fused":
        with pytest.raises(InputError, match="EXP-CACHE"):
            mla_deploy.export(TINY, tmp_path / "b", **options)
        return
    assert made(cache_layout=layout).manifest["cache"]["layout"] == "split"
