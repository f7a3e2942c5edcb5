"""Cache, activations and resident memory, predicted and then measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mla_deploy
from mla_deploy.bundle import Bundle
from mla_deploy.cache_plan import ITEM_BYTES
from mla_deploy.engine.build_graph import Recipe, build_graph
from mla_deploy.engine.profiles import bundle_profiles
from mla_deploy.export import export
from mla_deploy.latent_store import STORES, rows_dtype
from mla_deploy.plan.memory import Memory, needed
from mla_deploy.plan.tensors import model_tensors, stored_bytes
from mla_deploy.plan.work import Model
from mla_deploy.runtime import open_runner
from mla_deploy.targets import find_target
from mla_deploy.weight_forms.form import parse_plan
from tests.export.published_shapes import write_shape
from tests.exported import exported, exported_checkpoint, exported_family

ROOT = Path(__file__).parents[2]
TRAINED = ROOT / "models" / "tiny-deepseek-v3"


def predicted(bundle: Bundle, batch: int, context: int) -> Memory:
    """By config and options alone; of the manifest only what an export was asked for."""
    config, manifest = bundle.config, bundle.manifest
    quantized = manifest["weights"].get("quantized")
    plan = parse_plan(quantized["plan"]) if quantized else None
    target, tensors = find_target(manifest["target"]), model_tensors(config)
    stored = stored_bytes(tensors, config, target, manifest["dtype"], plan)
    cache = manifest["cache"]["dtype"]
    itemsize = ITEM_BYTES[rows_dtype(cache, manifest["dtype"])]
    return needed(
        Model(config, tensors, stored, itemsize, STORES.get(cache)), target, batch, context
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "fp16"}, *({"cache_dtype": name} for name in ("int8", "int4", "int8-all"))],
)
def test_cache_bytes_of_the_trained_model(options: dict[str, Any]) -> None:
    bundle = exported_checkpoint(TRAINED, **options).bundle
    runner = open_runner(bundle, batch=3, capacity=100)
    assert runner.cache_bytes == predicted(bundle, 3, 100).cache_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["deepseek_v2", "minicpm3", "deepseek_v32", "longcat_flash", "kimi_linear"]
)
def test_cache_bytes_of_families(family: str) -> None:
    bundle = exported_family(family).bundle
    runner = open_runner(bundle, batch=2, capacity=40)
    assert runner.cache_bytes == predicted(bundle, 2, 40).cache_bytes


def test_engines_hold_weights_twice_and_old_ones_the_cache_too() -> None:
    new, old = (
        predicted(exported("v2-lite", target=target, dtype="fp16", capacity=64).bundle, 2, 64)
        for target in ("rtx-40", "jetson-orin-jp6")
    )
    assert new.weights_held_bytes == 2 * new.weights_bytes
    assert old.cache_bytes == 2 * new.cache_bytes


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [4096, 32768])
def test_activations_are_those_of_the_builder(tmp_path: Path, capacity: int) -> None:
    """One layer in DeepSeek-V2-Lite's shape; a real build by TensorRT-RTX, no GPU."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    checkpoint = write_shape(tmp_path / "checkpoint", "v2-lite")
    bundle = export(checkpoint, tmp_path / "bundle", target="rtx-40", capacity=capacity)
    found = predicted(bundle, 1, capacity)
    recipe = Recipe("tensorrt_rtx", "rtx-1.7", ("8.9",))
    for text, bytes_ in (
        ("decode:batch=1", found.decode_activation_bytes),
        ("prefill:batch=1,new_tokens=1..512", found.prefill_activation_bytes),
    ):
        graph = text.partition(":")[0]
        (profile,) = bundle_profiles(bundle, [text])[graph]  # type: ignore[index]
        (tmp_path / graph).mkdir()
        report = build_graph(bundle, [profile], recipe, tmp_path / graph).report
        assert bytes_ == pytest.approx(report.profiles[0].activation_bytes, rel=0.25), text


# What a process holds at most in a prefill of 2,048 tokens and a few steps.
PROCESS = """
import sys
import numpy as np
import mla_deploy
bundle = mla_deploy.open_bundle(sys.argv[1])
runner = mla_deploy.open_runner(bundle, batch=1, capacity=2100)
ids = np.random.default_rng(0).integers(3, 500, 2048)
runner.prefill([[int(token) for token in ids]])
for _ in range(3):
    runner.decode([7])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(1024 * int(status["VmHWM"].split()[0]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"dtype": "fp16"}, {"weights": "int4"}], ids=str)
def test_resident_memory_of_onnx_runtime(options: dict[str, Any], tmp_path: Path) -> None:
    """A layer in Youtu-LLM's shape, 217 MB of fp32 weights; what `ps` would show."""
    checkpoint = write_shape(tmp_path / "checkpoint", "youtu")
    bundle = export(checkpoint, tmp_path / "bundle", **options)
    command = [sys.executable, "-c", PROCESS, str(bundle.path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    measured = int(done.stdout)
    assert predicted(bundle, 1, 2100).resident_bytes == pytest.approx(measured, rel=0.15)
    assert mla_deploy.open_bundle(bundle.path).digest == bundle.digest
