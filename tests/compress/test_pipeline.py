"""`compress` from checkpoint to checkpoint: exact forms, low rank, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mla_deploy import compress
from mla_deploy.errors import BusyError, InputError, MlaDeployError
from tests.compress.llamas import fields_of, write_llama

CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-mha-tied": ("Llama", {"num_key_value_heads": 6, "tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("Llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
    "yarn": ("Llama", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 128}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "phi3": ("Phi3", {}),
}  # fmt: skip


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """By transformers' Auto classes, which know the compressed class once we are imported."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids).logits
    return found


@pytest.mark.parametrize("name", CLASSES)
def test_exact(name: str, tmp_path: Path) -> None:
    family, fields = CLASSES[name]
    source = write_llama(tmp_path / "source", family, tokenizer=False, **fields)
    report = compress(source, tmp_path / "out")
    assert report.method == "exact"
    assert report.cached_values == report.cached_values_source
    assert report.loss is not None and report.loss.verdict == "exact"
    assert report.loss.mean_kl < 1e-6 and report.loss.top1 == 1.0
    ids = torch.randint(0, 2048, (2, 150), generator=torch.Generator().manual_seed(7))
    wanted, found = logits(source, ids), logits(tmp_path / "out", ids)
    assert (wanted - found).abs().max() < 2e-5 * wanted.abs().max()


def test_low_rank_is_worse_the_less_is_kept(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source")
    losses = []
    for name, rank, rope in (("most", 44, 16), ("half", 24, 8), ("least", 16, 4)):
        report = compress(source, tmp_path / name, rank=rank, rope_dim=rope, context=256)
        assert report.loss is not None and report.loss.text == "sample"
        losses.append(report.loss.mean_kl)
        assert report.cached_values == 2 * (rank + rope)
        fields = fields_of(tmp_path / name)
        assert (fields["kv_lora_rank"], fields["qk_rope_head_dim"]) == (rank, rope)
    assert losses == sorted(losses)
    told = json.loads((tmp_path / "least" / "compress.json").read_text(encoding="utf-8"))
    assert told["loss"]["verdict"] != "exact"


def test_all_turning_and_every_axis_is_exact_by_the_low_rank_way_too(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source", "Qwen2")
    report = compress(source, tmp_path / "out", rank=32, rope_dim=32, context=256)
    assert report.loss is not None and report.loss.mean_kl < 1e-6


def test_transmla_beside_it(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source")
    ours = compress(source, tmp_path / "ours", rank=32, rope_dim=16, context=256)
    theirs = compress(source, tmp_path / "theirs", rank=32, method="transmla", context=256)
    assert theirs.rope == 16 and theirs.method == "transmla"
    assert ours.loss is not None and theirs.loss is not None
    assert ours.loss.mean_kl < theirs.loss.mean_kl


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rank above what there is": ({"rank": 49, "rope_dim": 16}, "CMP-RANK"),
    "rank below one head": ({"rank": 15, "rope_dim": 16}, "CMP-RANK"),
    "odd rope": ({"rope_dim": 3}, "CMP-ROPE"),
    "rope above what turns": ({"rope_dim": 34}, "CMP-ROPE"),
    "context beyond the model's": ({"context": 513}, "CMP-CONTEXT"),
    "another method": ({"method": "svd"}, "CMP-METHOD"),
    "another dtype": ({"dtype": "int8"}, "CMP-DTYPE"),
    "TransMLA with two heads": ({"method": "transmla", "rope_dim": 32}, "CMP-ROPE"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str, tmp_path: Path) -> None:
    options, code = REFUSED[what]
    source = write_llama(tmp_path / "source")
    with pytest.raises(InputError, match=code):
        compress(source, tmp_path / "out", **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_a_text_that_is_too_short_says_how_much_is_needed(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source")
    (tmp_path / "text.txt").write_text("There was a man. " * 40, encoding="utf-8")
    with pytest.raises(InputError, match="CMP-TEXT") as caught:
        compress(source, tmp_path / "out", rank=32, calibrate=tmp_path / "text.txt")
    assert "wanted at least 6400" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_no_tokenizer_no_calibration(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source", tokenizer=False)
    with pytest.raises(InputError, match="CMP-TEXT"):
        compress(source, tmp_path / "out", rank=32)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    """With more words than the model has, in the exact form too."""
    source = write_llama(tmp_path / "source", vocab_size=512)
    with pytest.raises(InputError, match="CMP-TEXT") as caught:
        compress(source, tmp_path / "out")
    assert "the model has 512" in caught.value.message
    assert not (tmp_path / "out").exists()


def test_norms_on_keys_cannot_be_absorbed(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source", "Qwen3", tokenizer=False)
    with pytest.raises(InputError, match="CMP-KEY-NORM"):
        compress(source, tmp_path / "out")


def test_a_layer_that_is_not_llamas(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source", "Olmo2", tokenizer=False)
    with pytest.raises(InputError, match=r"CMP-(KEY-NORM|LAYER)"):
        compress(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("field", "code"),
    [("residual_multiplier", "CMP-LAYER"), ("logits_scaling", "CMP-TRUNK"),
     ("embedding_multiplier", "CMP-TRUNK")],
)  # fmt: skip
def test_numbers_say_no_where_modules_look_alike(field: str, code: str, tmp_path: Path) -> None:
    """Granite's layers have Llama's parts, and multipliers that no module shows."""
    source = write_llama(tmp_path / "source", "Granite", tokenizer=False, **{field: 0.3})
    with pytest.raises(MlaDeployError, match=code):
        compress(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_there_is_left_alone(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source", tokenizer=False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept", encoding="utf-8")
    with pytest.raises(BusyError, match="BUN-EXISTS"):
        compress(source, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text(encoding="utf-8") == "kept"


def test_a_missing_weight_is_named_before_anything_is_written(tmp_path: Path) -> None:
    import safetensors.torch

    source = write_llama(tmp_path / "source", tokenizer=False)
    file = source / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(InputError, match="CKPT-MISSING") as caught:
        compress(source, tmp_path / "out")
    assert "k_proj" in str(caught.value)


def test_a_model_that_is_mla_already() -> None:
    tiny = Path(__file__).parents[2] / "models" / "tiny-deepseek-v3"
    with pytest.raises(InputError, match="CMP-MLA"):
        compress(tiny, "never")


def test_the_report_is_read_again_or_refused(tmp_path: Path) -> None:
    from mla_deploy.compress.page import page
    from mla_deploy.compress.told import read_report

    source = write_llama(tmp_path / "source")
    report = compress(source, tmp_path / "out", rank=24, rope_dim=8, context=256)
    told = read_report(tmp_path / "out")
    assert page(told) == page(report.to_dict())
    with pytest.raises(InputError, match="CMP-REPORT"):
        read_report(source)
    (tmp_path / "out" / "compress.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="CMP-REPORT"):
        read_report(tmp_path / "out")
