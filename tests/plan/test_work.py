"""Bounds of speed against sums done by hand, and what fits against the sums themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mla_deploy.config import MlaConfig, parse_config
from mla_deploy.devices import DEVICES, find_device
from mla_deploy.plan import plan
from mla_deploy.plan.fit import most
from mla_deploy.plan.memory import needed
from mla_deploy.plan.models import find_model
from mla_deploy.plan.report import PlanReport
from mla_deploy.plan.rivals import FULL_HEADS, GQA
from mla_deploy.plan.tensors import model_tensors, stored_bytes
from mla_deploy.plan.work import Model, bound, decode_work, expected_experts, prefill_work
from mla_deploy.targets import TARGETS, find_target

# DeepSeek-V2-Lite: layers, of them with experts, heads, width; experts, chosen, shared, width.
LAYERS, SPARSE, HEADS, WIDTH = 27, 26, 16, 2048
EXPERTS, CHOSEN, SHARED, INNER, DENSE, VOCABULARY = 64, 6, 2, 1408, 10944, 102400
LATENT, ROPE, NOPE, VALUE = 512, 64, 128, 128


@pytest.fixture(scope="module")
def lite() -> Model:
    config = find_model("deepseek-v2-lite").config
    tensors = model_tensors(config)
    stored = stored_bytes(tensors, config, find_target("h100"), "fp16", None)
    return Model(config, tensors, stored, 2, None)


@pytest.fixture(scope="module")
def report() -> PlanReport:
    return plan("deepseek-v2-lite", device="agx-orin-64,h100", context=32768, batch=2)


def active() -> int:
    """Elements of the matrices that one token is multiplied with."""
    attention = WIDTH * HEADS * (NOPE + ROPE) + WIDTH * (LATENT + ROPE)
    attention += LATENT * HEADS * (NOPE + VALUE) + HEADS * VALUE * WIDTH
    experts = 3 * WIDTH * INNER * (CHOSEN + SHARED) + WIDTH * EXPERTS
    return LAYERS * attention + SPARSE * experts + 3 * WIDTH * DENSE + WIDTH * VOCABULARY


def test_a_decode_step(lite: Model) -> None:
    work = decode_work(lite, batch=1, context=4096)
    routers = 2 * SPARSE * WIDTH * EXPERTS  # they stay fp32
    assert work.weight_bytes == pytest.approx(2 * active() + routers, rel=0.001)
    assert work.cache_bytes == LAYERS * 4096 * (LATENT + ROPE) * 2
    attention = LAYERS * HEADS * 4096 * (2 * LATENT + ROPE)
    assert work.flops == pytest.approx(2 * (active() + attention), rel=0.001)
    found = bound(work, 3350.0, 989.5)
    assert found is not None and found.bound_by == "bandwidth"
    assert found.tokens_per_second == pytest.approx(
        3350e9 / (work.weight_bytes + work.cache_bytes), rel=1e-6
    )


def test_a_prefill_meets_every_expert_and_is_arithmetic(lite: Model) -> None:
    work = prefill_work(lite, batch=1, tokens=8192)
    head = WIDTH * VOCABULARY
    pairs = 8192 * 8193 // 2 * LAYERS * HEADS * (NOPE + ROPE + VALUE)
    assert work.flops == pytest.approx(2 * ((active() - head) * 8192 + head + pairs), rel=0.001)
    rows = 2 * head * 8192 / VOCABULARY
    assert work.weight_bytes == pytest.approx(lite.stored.total - 2 * head + rows, rel=0.001)
    found = bound(work, 204.8, 42.5)
    assert found is not None and found.bound_by == "arithmetic"
    assert bound(work, None, 42.5) is None


def test_expected_experts_by_drawing_them(lite: Model) -> None:
    """E (1 - (1 - k/E)^B) against a walk over all rows: each misses an expert with 1 - k/E."""
    assert expected_experts(lite.config, 1) == pytest.approx(CHOSEN)
    missed = 1.0
    for row in range(1, 40):
        missed *= (EXPERTS - CHOSEN) / EXPERTS
        assert expected_experts(lite.config, row) == pytest.approx(EXPERTS * (1 - missed))
    dense = find_model("minicpm3-4b").config
    assert expected_experts(dense, 8) == 0


def test_other_attentions(lite: Model) -> None:
    sizes = {"batch": 2, "capacity": 1000, "itemsize": 2}
    full = FULL_HEADS.cache_bytes(lite.config, **sizes)
    assert full == 2 * 1000 * lite.config.expanded_bytes_per_token(2)
    assert GQA.cache_bytes(lite.config, **sizes) == 2 * 1000 * LAYERS * 2 * 8 * 128 * 2
    slower = decode_work(lite, 1, 32768, FULL_HEADS)
    assert slower.cache_bytes == LAYERS * 32768 * HEADS * (NOPE + ROPE + VALUE) * 2


def test_a_hybrid_reads_chosen_rows_and_states() -> None:
    config = find_model("deepseek-v3.2").config
    tensors = model_tensors(config)
    stored = stored_bytes(tensors, config, find_target("h200"), "fp16", None)
    work = decode_work(Model(config, tensors, stored, 2, None), 1, 65536)
    assert work.cache_bytes == 61 * 2 * (2048 * 576 + 65536 * 128)
    linear = find_model("kimi-linear-48b").config
    per_token = FULL_HEADS.cache_bytes(linear, batch=1, capacity=1001, itemsize=2)
    per_token -= FULL_HEADS.cache_bytes(linear, batch=1, capacity=1000, itemsize=2)
    assert per_token == 7 * 32 * (128 + 64 + 128) * 2


def test_longest_and_biggest_are_the_last_that_fit(lite: Model, report: PlanReport) -> None:
    for row in report.devices:
        target = row.device.row

        def total(batch: int, context: int, target=target) -> int:  # type: ignore[no-untyped-def]
            return needed(lite, target, batch, context).total_bytes

        longest, biggest = row.longest_context, row.biggest_batch
        assert longest == 0 or total(2, longest) <= row.usable_bytes
        if longest < lite.config.max_position_embeddings:
            assert total(2, longest + 1) > row.usable_bytes
        assert biggest == 0 or total(biggest, 32768) <= row.usable_bytes < total(biggest + 1, 32768)
        assert row.fits == (total(2, 32768) <= row.usable_bytes)
    assert [row.fits for row in report.devices] == [False, True]


@pytest.mark.parametrize("limit", [0, 1, 2, 17])
def test_most(limit: int) -> None:
    for last in range(limit + 3):
        assert most(limit, lambda count, last=last: count <= last) == min(limit, last)


def test_devices_agree_with_their_targets() -> None:
    """Figures that stand in both tables are the same."""
    same = {"agx-orin-64": "jetson-orin-jp7", "thor-128": "jetson-thor-jp7", "a100-80": "a100",
            "h100": "h100", "h200": "h200", "b200": "b200", "rtx-4090": "rtx-40",
            "rtx-5090": "rtx-50", "dgx-spark": "dgx-spark"}  # fmt: skip
    for name, target in same.items():
        device, row = find_device(name), find_target(target)
        assert device.target == target
        assert (device.memory_gib, device.bandwidth_gb_s) == (row.memory_gib, row.bandwidth_gb_s)
    assert {device.target for device in DEVICES} <= {target.name for target in TARGETS}
    for device in DEVICES:
        assert 0 < device.reserved_gib < device.memory_gib and device.source
        assert {"fp16", "bf16", "int8"} <= set(device.tflops)
        assert ("fp8" in device.tflops) == ("fp8" in device.row.dtypes)


def test_every_published_config_is_planned_for() -> None:
    """Also those with layers that TensorRT has no lowering of, which is told."""
    for name in ("ling-3.0-flash", "glm-5", "youtu-llm-2b"):
        row = plan(name, device="thor-128", context=1000).devices[0]
        assert bool(row.notes) == (name == "ling-3.0-flash")
        assert row.decode is not None and row.memory.cache_bytes > 0


def parsed(**fields: object) -> MlaConfig:
    raw = dict(find_model("youtu-llm-2b").config.raw)
    return parse_config(json.dumps({**raw, **fields}).encode())


def test_a_config_does_what_it_says() -> None:
    """Half the layers, half the cache and, but for the embedding, half the weights."""
    whole, half = parsed(), parsed(num_hidden_layers=16)
    counts = [sum(t.elements for t in model_tensors(each)) for each in (whole, half)]
    embedding = 128256 * 2048
    assert counts[1] - embedding == pytest.approx((counts[0] - embedding) / 2, rel=1e-4)


def test_a_model_without_routed_experts_is_planned_for(tmp_path: Path) -> None:
    """Its sparse layers have shared experts only."""
    raw = dict(find_model("deepseek-v2-lite").config.raw, n_routed_experts=0)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    found = plan(tmp_path / "config.json", device="h100")
    whole = plan("deepseek-v2-lite", device="h100").model.parameters
    assert found.model.parameters == whole - SPARSE * EXPERTS * WIDTH * (3 * INNER + 1)
