"""Predicted against measured: activations and host memory of real TensorRT-RTX builds, no GPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import mla_deploy
from mla_deploy.bundle import Bundle
from mla_deploy.engine.build_graph import Recipe, build_graph
from mla_deploy.engine.estimate import activation_bytes, host_limit
from mla_deploy.engine.pipeline import RTX_SMS
from mla_deploy.engine.profiles import bundle_profiles
from tests.tiny import write_tiny

pytest.importorskip("tensorrt_rtx")

TRAINED = Path(__file__).parents[2] / "models" / "tiny-deepseek-v3"
RECIPE = Recipe("tensorrt_rtx", "rtx-1.7", ("8.9",))
_GIB = 1 << 30
_SMS = RTX_SMS[1:]  # SM 7.5 has no fp32 products, which the router of the experts is


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """One layer a quarter as wide as DeepSeek-V2-Lite's, 4096 tokens of capacity, fp16."""
    folder = tmp_path_factory.mktemp("layer")
    write_tiny(
        folder / "checkpoint", "deepseek_v2", hidden_size=512, intermediate_size=1024,
        num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=8, kv_lora_rank=256,
        q_lora_rank=None, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
        max_position_embeddings=8192,
    )  # fmt: skip
    return mla_deploy.export(
        folder / "checkpoint", folder / "bundle", target="rtx-40", dtype="fp16", capacity=4096
    )


@pytest.mark.parametrize(
    "text",
    ["decode:batch=1", "decode:batch=1..4", "prefill:batch=1,new_tokens=1..512",
     "prefill:batch=1,new_tokens=64"],
)  # fmt: skip
def test_predictions_hold(layer: Bundle, tmp_path: Path, text: str) -> None:
    graph = text.partition(":")[0]
    (profile,) = bundle_profiles(layer, [text])[graph]  # type: ignore[index]
    report = build_graph(layer, [profile], RECIPE, tmp_path).report
    measured = report.profiles[0].activation_bytes
    assert measured is not None
    # An upper figure: with heads this narrow the builder frees the product before the values stand.
    assert 0.9 < activation_bytes(layer, profile) / measured < 1.35
    weights = int(layer.manifest["weights"]["bytes"])
    assert report.peak_host_bytes < host_limit(weights, 1) == 3 * weights + _GIB
    assert weights * 0.9 < report.plan_bytes < weights * 1.1 + 16 * 2**20


def test_the_trained_model_builds_for_every_gpu(tmp_path: Path) -> None:
    """Both engines of all four layers, every compute capability but SM 7.5, audit passed."""
    bundle = mla_deploy.export(TRAINED, tmp_path / "b", target="rtx-40", capacity=512)
    made = mla_deploy.build(bundle, sms=_SMS, profiles=["prefill:new_tokens=1..128"])
    assert made.bundle.engine is not None and made.bundle.engine.sms == _SMS
    assert [line for line in made.audit if not line.passed] == []
    prefill, decode = made.report.graphs
    assert (prefill.layers["KV_CACHE_UPDATE"], decode.layers["KV_CACHE_UPDATE"]) == (4, 4)
    assert prefill.layers["ATTENTION_INPUT"] == 4
    assert "ATTENTION_INPUT" not in decode.layers
    assert decode.warnings == prefill.warnings == ()
    again = mla_deploy.open_bundle(bundle.path)
    assert again.engine is not None and again.digest == bundle.digest
    assert dataclasses.replace(again, engine=None).files == bundle.files
