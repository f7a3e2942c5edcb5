"""Bundles with quantised weights: their graphs are right, their bytes are those of the plan."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from mla_deploy import export, open_runner, quantize, validate
from mla_deploy.bundle.structure import check_sections
from mla_deploy.errors import InputError, IntegrityError
from mla_deploy.validate.loss_check import measure_loss
from tests.exported import exported
from tests.tiny import write_preset

TRAINED = Path(__file__).parents[2] / "models" / "tiny-deepseek-v3"


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("v3-yarn-all-dim", {"weights": "int4"}),
        ("v3-yarn-all-dim", {"weights": "int8", "dtype": "bf16", "cache_layout": "split"}),
        ("v3-tied-eps", {"weights": "int4:asymmetric"}),
        ("youtu-bias-five-heads", {"weights": "int8:block=32,asymmetric"}),
        ("v3-no-query-rank", {"weights": "int4:asymmetric,mixed,o=keep"}),
        ("v3-no-query-rank", {"weights": "int4:kv_b=int8,head=keep,embedding=keep"}),
        ("minicpm3", {"weights": "int8", "cache": "growing", "dtype": "fp16"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_a_quantised_bundle_is_its_source_rounded_alike(
    preset: str, options: dict[str, Any]
) -> None:
    made = exported(preset, **options)
    report = validate(made.bundle, source=made.checkpoint, threads=1)
    failed = {case.name: case.failures for case in report.cases if case.failures}
    assert failed == {}
    assert report.loss is not None
    assert report.loss.on == "text"
    told = made.bundle.manifest["weights"]["quantized"]
    assert told["plan"] == options["weights"]
    assert told["tensors"] > 0


def test_one_that_is_rounded_otherwise_fails(tmp_path: Path) -> None:
    """The manifest says int8 where the weights are int4: cases fail by far."""
    made = exported("v3-yarn-all-dim", weights="int4:embedding=int4")
    other = exported("v3-yarn-all-dim", weights="int8")
    report = validate(made.bundle, source=made.checkpoint, threads=1)
    worst = max(case.logits.rel_l2 for case in report.cases if case.logits)
    fine = validate(other.bundle, source=made.checkpoint, threads=1)
    assert report.rounding is not None
    assert fine.rounding is not None
    assert report.rounding.rel_l2 > 5 * fine.rounding.rel_l2 > 0
    assert worst < report.rounding.rel_l2  # held against the source rounded alike it is near


def test_the_names_in_the_file_and_the_manifest() -> None:
    made = exported("v3-yarn-all-dim", weights="int4")
    held = load_file(made.bundle.path / "weights.safetensors")
    layer = "model.layers.0.self_attn"
    assert held[f"{layer}.o_proj.weight.values"].dtype == np.uint8
    assert held[f"{layer}.o_proj.weight.scales"].dtype == np.float32
    assert f"{layer}.o_proj.weight" not in held
    assert f"{layer}.kv_b_proj.w_uv_HLV.values" in held
    assert held[f"{layer}.kv_b_proj.w_uk_HNL"].ndim == 3  # 8 wide: no block
    assert held["model.layers.1.mlp.gate.weight"].dtype == np.float32
    assert held["model.layers.1.mlp.experts.0.up_proj.weight.values"].ndim == 3
    roles = made.bundle.manifest["weights"]["quantized"]["roles"]
    assert roles["linear"] == "int4:block=32"
    assert roles["embedding"] == "int8:block=32"


def test_a_part_of_the_linear_layers_has_bits_of_its_own() -> None:
    made = exported("v3-no-query-rank", weights="int4:asymmetric,mixed,o=keep")
    roles = made.bundle.manifest["weights"]["quantized"]["roles"]
    assert (roles["kv_a"], roles["down"], roles["o"]) == ("int8:block=64", "int8:block=64", "keep")
    held = load_file(made.bundle.path / "weights.safetensors")
    layer = "model.layers.0"
    assert f"{layer}.self_attn.o_proj.weight" in held
    bits = {
        name: 8 * held[f"{layer}.{name}.weight.values"].shape[-1] // block
        for name, block in (
            ("self_attn.q_proj", 32),
            ("self_attn.kv_a_proj_with_mqa", 64),
            ("mlp.up_proj", 32),
            ("mlp.down_proj", 64),
        )
    }
    assert list(bits.values()) == [4, 8, 4, 8]


def test_tied_weights_are_stored_once() -> None:
    made = exported("v3-tied-eps", weights="int4:asymmetric")
    held = load_file(made.bundle.path / "weights.safetensors")
    assert [name for name in held if "lm_head" in name] == []
    assert "model.embed_tokens.weight.values" in held


def test_a_quantised_float_bundle_has_the_same_bytes(tmp_path: Path) -> None:
    """Halves that were cut, and the embedding's rows, are rounded as from the checkpoint."""
    made = exported("v3-yarn-all-dim", weights="int4")
    plain = exported("v3-yarn-all-dim")
    again = quantize(plain.bundle, tmp_path / "again", weights="int4")
    names = ("weights.safetensors", "prefill.onnx", "decode.onnx")
    assert [again.files[n].sha256 for n in names] == [made.bundle.files[n].sha256 for n in names]
    assert (
        again.manifest["source"]["checkpoint_digest"]
        == (plain.bundle.manifest["source"]["checkpoint_digest"])
    )
    loss = measure_loss(again, plain.bundle, threads=1)
    assert loss["on"] == "text"
    assert 0 < loss["mean_kl"] < 1.0
    with pytest.raises(InputError) as refusal:
        quantize(again, tmp_path / "twice", weights="int8")
    assert refusal.value.code == "QNT-AGAIN"
    assert not (tmp_path / "twice").exists()


def test_a_bundle_with_no_weights_of_its_own_is_refused(tmp_path: Path) -> None:
    write_preset(tmp_path / "checkpoint", "v3")
    kept = export(tmp_path / "checkpoint", tmp_path / "kept", weights="keep")
    with pytest.raises(InputError) as refusal:
        quantize(kept, tmp_path / "out", weights="int4")
    assert refusal.value.code == "QNT-SOURCE"
    with pytest.raises(InputError) as refusal:
        quantize(kept, tmp_path / "out", weights="keep")
    assert refusal.value.code == "EXP-WEIGHT-FORM"


def test_without_a_tokenizer_the_loss_is_on_random_ids(tmp_path: Path) -> None:
    write_preset(tmp_path / "checkpoint", "v3")
    bundle = export(tmp_path / "checkpoint", tmp_path / "out", weights="int8")
    plain = export(tmp_path / "checkpoint", tmp_path / "plain")
    loss = measure_loss(bundle, plain, threads=1)
    assert loss["on"] == "random ids"
    assert loss["perplexity_ratio"] is None
    assert loss["failures"] == []
    with pytest.raises(InputError) as refusal:
        measure_loss(bundle, plain, text="some words")
    assert refusal.value.code == "VAL-TEXT"


def test_a_text_that_is_too_short_is_refused() -> None:
    made = exported("v3-yarn-all-dim", weights="int4")
    with pytest.raises(InputError) as refusal:
        measure_loss(made.bundle, exported("v3-yarn-all-dim").bundle, text="too short")
    assert refusal.value.code == "VAL-TEXT"
    assert "wanted at least" in refusal.value.message


@pytest.mark.parametrize(("weights", "size"), [("int8", 0.40), ("int4", 0.25)])
def test_the_trained_model_meets_its_gates(tmp_path: Path, weights: str, size: float) -> None:
    plain = export(TRAINED, tmp_path / "plain")
    found = quantize(plain, tmp_path / "out", weights=weights)
    loss = measure_loss(found, plain)
    assert loss["failures"] == []
    assert loss["positions"] == 1024
    assert loss["mean_kl"] > 1e-5
    assert found.manifest["weights"]["bytes"] < size * plain.manifest["weights"]["bytes"]
    told = {role: form for role, form in found.manifest["weights"]["quantized"]["roles"].items()}
    assert set(told) == {"linear", "kv_b", "experts", "head", "embedding"}


def test_a_manifest_with_a_damaged_section_is_refused() -> None:
    manifest = copy.deepcopy(dict(exported("v3-yarn-all-dim", weights="int4").bundle.manifest))
    files = set(manifest["files"])
    check_sections(manifest, files)
    manifest["weights"]["quantized"]["plan"] = 4
    with pytest.raises(IntegrityError, match=r"weights\.quantized\.plan"):
        check_sections(manifest, files)


def test_it_runs_token_by_token_as_in_one_piece() -> None:
    made = exported("v3-yarn-all-dim", weights="int8")
    ids = [3, 17, 40, 5, 62, 8, 80, 21]
    runner = open_runner(made.bundle, threads=1)
    whole = runner.prefill([ids])
    runner.reset()
    for token in ids[:-1]:
        runner.decode([token])
    steps = runner.decode([ids[-1]])
    error = np.linalg.norm(whole - steps) / np.linalg.norm(whole)
    assert error < 0.05
