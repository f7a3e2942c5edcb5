"""Every family of latent attention that transformers has, end to end: export, absorb, validate.

`validate` holds the bundle against the source over prefill lengths, every split of 17, chunks, 64
decode steps and ragged batches, with NaN in every slot that nothing was written to, and measures
the cache. Variations of the plain families are in `test_families.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mla_deploy import open_runner
from mla_deploy.bundle import Bundle, open_bundle
from mla_deploy.cache_plan import cache_plan
from mla_deploy.config import read_config
from mla_deploy.errors import InputError
from mla_deploy.export import export
from mla_deploy.runtime import generate
from mla_deploy.validate import validate
from tests.families import FAMILIES, write_family
from tests.tiny import YARN_ALL_DIM

SPARSE = ("deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4", "mistral_large4", "dots3_note_text")
HYBRID = ("kimi_linear", "bailing_hybrid", "glm5_next")
OTHERS = ("longcat_flash", "mistral4", "axk1", "kimi_k25", "mistral3")
VARIANTS = ("hy_v4-odd-heads", "mistral_large4-no-sharing", "kimi_linear-query-rank")


def made(
    folder: Path, name: str, overrides: dict[str, object] | None = None, **options: object
) -> Bundle:
    write_family(folder / "checkpoint", name, **(overrides or {}))  # type: ignore[arg-type]
    export(folder / "checkpoint", folder / "bundle", **options)  # type: ignore[arg-type]
    return open_bundle(folder / "bundle")


# Widths, heads, groups, bias and a scaled rope that no family has together.
MIXTURE: dict[str, object] = {
    "num_attention_heads": 3, "num_key_value_heads": 3, "qk_nope_head_dim": 12, "v_head_dim": 20,
    "n_group": 4, "topk_group": 2, "attention_bias": True, "rope_parameters": YARN_ALL_DIM,
}  # fmt: skip


def check(folder: Path, name: str, **overrides: object) -> None:
    bundle = made(folder, name, overrides=overrides)
    report = validate(bundle, source=folder / "checkpoint")
    failed = {case.name: case.failures for case in report.cases if case.failures}
    assert failed == {} and report.passed
    worst = max(case.logits.max_abs for case in report.cases if case.logits)
    assert worst < 1e-4
    planned = cache_plan(read_config(folder / "checkpoint"))
    tensors = bundle.manifest["cache"]["tensors"]
    assert [t["elements"] for t in tensors] == [cached.elements for cached in planned]
    assert len(list(generate(open_runner(bundle, capacity=40), [5, 8, 2], 30))) == 30


# Three classes, so that the workers share them.
class TestSparse:
    @pytest.mark.parametrize("name", SPARSE)
    def test_family(self, tmp_path: Path, name: str) -> None:
        check(tmp_path, name)


class TestHybrid:
    @pytest.mark.parametrize("name", HYBRID)
    def test_family(self, tmp_path: Path, name: str) -> None:
        check(tmp_path, name)


class TestOthers:
    @pytest.mark.parametrize("name", (*OTHERS, *VARIANTS))
    def test_family(self, tmp_path: Path, name: str) -> None:
        check(tmp_path, name)


def test_a_mixture_of_known_parts_needs_no_code(tmp_path: Path) -> None:
    check(tmp_path, "glm_moe_dsa", **MIXTURE)


def test_pools_that_may_choose_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="index_kpool_always_select_tail"):
        made(tmp_path, "glm5_next", {"index_kpool_always_select_tail": False})
    assert not (tmp_path / "bundle").exists()


# What no family's own preset has: a cache that grows beside states and pools, a router without
# identity experts, routing by groups over layers of two widths, a clamp of another size.
@pytest.mark.parametrize(
    ("name", "overrides", "options"),
    [
        ("glm5_next", {}, {"cache": "growing"}),
        ("longcat_flash", {"zero_expert_num": 0}, {}),
        ("dots3_note_text", {"n_group": 4, "topk_group": 2}, {}),
        ("hy_v4", {"swiglu_limit": 2.0}, {}),
    ],
    ids=["growing", "no-identity-experts", "groups", "wide-clamp"],
)
def test_variations(
    tmp_path: Path, name: str, overrides: dict[str, object], options: dict[str, object]
) -> None:
    bundle = made(tmp_path, name, overrides, **options)
    report = validate(bundle, source=tmp_path / "checkpoint")
    assert {case.name: case.failures for case in report.cases if case.failures} == {}
    assert report.passed


@pytest.mark.skipif("hy_v4_vl" not in FAMILIES, reason="transformers has no hy_v4_vl before 5.24")
def test_text_of_a_model_that_sees(tmp_path: Path) -> None:
    """Its rope turns by positions on three axes, which are one and the same for text."""
    check(tmp_path, "hy_v4_vl")


def test_routers_with_identity_experts_are_not_rounded(tmp_path: Path) -> None:
    """Their rows are more than the experts that have weights."""
    from safetensors.torch import load_file

    bundle = made(tmp_path, "longcat_flash", dtype="bf16")
    stored = load_file(bundle.path / "weights.safetensors")
    routers = {name: tensor for name, tensor in stored.items() if "router.classifier" in name}
    assert {tuple(tensor.shape) for tensor in routers.values()} == {(8 + 4, 48)}
    assert {str(tensor.dtype) for tensor in routers.values()} == {"torch.float32"}
    assert validate(bundle, source=tmp_path / "checkpoint").passed


def test_each_of_these_is_a_known_family() -> None:
    assert {*SPARSE, *HYBRID, *OTHERS, *VARIANTS} <= set(FAMILIES)


def test_what_a_hybrid_keeps_is_explicit(tmp_path: Path) -> None:
    """States are graph inputs of a kind of their own; their bytes do not grow with capacity."""
    bundle = made(tmp_path, "kimi_linear")
    kinds = {value.kind for value in bundle.inputs("decode")}
    assert {"conv_state", "recurrent_state", "latent_cache"} <= kinds
    small, large = (open_runner(bundle, capacity=n).cache_bytes for n in (10, 20))
    assert large - small == 10 * bundle.manifest["cache"]["bytes_per_token"]


def test_a_sliding_layer_keeps_a_window(tmp_path: Path) -> None:
    bundle = made(tmp_path, "dots3_note_text", cache_layout="split")
    window = json.loads((tmp_path / "checkpoint" / "config.json").read_text())["sliding_window"]
    rings = [t for t in bundle.manifest["cache"]["tensors"] if t["rows"] == window]
    assert rings and all(t["kind"] in ("latent_cache", "rope_key_cache") for t in rings)
    shapes = {value.name: value.shape for value in bundle.inputs("decode")}
    assert all(shapes[t["input"]][2] == window for t in rings)
    assert validate(bundle, source=tmp_path / "checkpoint").passed


def test_a_layer_that_reads_another_s_rows_keeps_none(tmp_path: Path) -> None:
    bundle = made(tmp_path, "mistral_large4", cache="growing")
    layers = read_config(tmp_path / "checkpoint").layers
    latents = {t["layer"] for t in bundle.manifest["cache"]["tensors"] if "latent" in t["kind"]}
    assert latents == {i for i, layer in enumerate(layers) if layer.owns_latent}
    assert validate(bundle, source=tmp_path / "checkpoint").passed
