"""`layout="deepseek"`: what transformers' own DeepSeek classes load, and what they make of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from mla_deploy import compress, export, validate
from mla_deploy.compress.text import rations
from mla_deploy.errors import InputError
from tests.compress.llamas import fields_of, write_llama
from tests.compress.test_pipeline import CLASSES

LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0,
    "original_max_position_embeddings": 128, "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [2.0 + 0.3 * i for i in range(8)],
}  # fmt: skip
# What the stock class is, and the width of its queries' latent.
EXACT: dict[str, tuple[str, dict[str, Any], str, int | None]] = {
    **{name: (*CLASSES[name], "V2", None) for name in CLASSES},
    "llama-biases": (*CLASSES["llama-biases"], "V2", 49),
    "qwen2": (*CLASSES["qwen2"], "V2", 97),
    "mqa": ("Llama", {"num_key_value_heads": 1}, "V2", None),
    "longrope": ("Llama", {"rope_parameters": LONGROPE}, "V2", None),
    "wide heads, biases": ("Llama", {"head_dim": 24, "attention_bias": True}, "V2", 49),
    "narrow heads, biases": ("Llama", {"head_dim": 4, "attention_bias": True}, "V2", 25),
    "a quarter turns": ("Phi3", {"partial_rotary_factor": 0.25}, "V2", None),
    "pairs side by side": ("Ernie4_5", {"use_bias": True}, "V2", 49),
    # V2 wants a hidden_size that its heads divide.
    "odd heads": ("Mistral", {"hidden_size": 50, "sliding_window": None}, "V3", None),
}
# Run where nothing of ours is imported.
_STOCK = """
import sys
import numpy as np, torch, transformers
folder, ids, out = sys.argv[1:]
model, told = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, output_loading_info=True)
assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
tokens = torch.from_numpy(np.load(ids))
with torch.no_grad():
    logits = model.eval()(input_ids=tokens).logits
    text = model.generate(input_ids=tokens[:1, :16], do_sample=False, max_new_tokens=24,
                          min_new_tokens=24)
np.savez(out, logits=logits.numpy(), text=text.numpy(), name=type(model).__name__)
assert not [name for name in sys.modules if name.startswith("mla_deploy")]
"""


def stock(folder: Path, ids: np.ndarray) -> Any:
    """Logits and 24 greedy tokens, by a process that knows transformers alone."""
    np.save(folder.parent / "ids.npy", ids)
    command = [sys.executable, "-W", "error", "-c", _STOCK, str(folder)]
    paths = [str(folder.parent / "ids.npy"), str(folder.parent / "stock.npz")]
    ran = subprocess.run([*command, *paths], cwd=folder.parent, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return np.load(folder.parent / "stock.npz")


def logits(folder: Path, ids: torch.Tensor) -> tuple[torch.Tensor, str]:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits, type(model).__name__


@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str, tmp_path: Path) -> None:
    family, fields, wanted_class, query_rank = EXACT[name]
    source = write_llama(tmp_path / "source", family, tokenizer=False, **fields)
    report = compress(source, tmp_path / "out", layout="deepseek")
    assert report.layout == "deepseek" and report.beside == {}
    # The norm's constant, and one to make it even, are all that it caches beyond its source.
    assert report.cached_values - report.cached_values_source == 2 * report.layers
    assert report.loss is not None and report.loss.mean_kl < 1e-9 and report.loss.top1 == 1.0
    assert fields_of(tmp_path / "out")["q_lora_rank"] == query_rank
    assert any("q_lora_rank" in note for note in report.notes) == (query_rank is not None)
    ids = torch.randint(0, 2048, (2, 150), generator=torch.Generator().manual_seed(7))
    (wanted, _), (found, kind) = logits(source, ids), logits(tmp_path / "out", ids)
    assert kind == f"Deepseek{wanted_class}ForCausalLM"
    assert (wanted - found).abs().max() < 5e-5 * wanted.abs().max()
    short = ids[:, :100]  # before longrope's switch
    (wanted, _), (found, _) = logits(source, short), logits(tmp_path / "out", short)
    assert (wanted - found).abs().max() < 5e-5 * wanted.abs().max()


# An odd rank is not for V2; biases in the MLP are not for V3.
CUT: dict[str, tuple[str, dict[str, Any], int]] = {
    "V3": ("Qwen2", {}, 33),
    "V2": ("Llama", {"attention_bias": True, "mlp_bias": True}, 32),
}


@pytest.fixture(scope="module", params=CUT)
def cut(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By rank, of a model with biases; its source and the report."""
    folder = tmp_path_factory.mktemp("cut")
    family, fields, rank = CUT[request.param]
    source = write_llama(folder / "source", family, **fields)
    report = compress(
        source, folder / "out", layout="deepseek", beside="own", rank=rank, rope_dim=12, context=256
    )
    assert fields_of(folder / "out")["architectures"] == [f"Deepseek{request.param}ForCausalLM"]
    return source, report


def test_the_stock_class_gives_what_the_report_says(cut: Any) -> None:
    source, report = cut
    texts = {"tokenizer.json": (source / "tokenizer.json").read_bytes()}
    judged = rations(texts, None, vocab=2048, context=256, calibrates=True).judged
    ids = np.array(judged)
    found = stock(report.path, ids)
    assert str(found["name"]) in ("DeepseekV3ForCausalLM", "DeepseekV2ForCausalLM")
    wanted, _ = logits(source, torch.from_numpy(ids))
    given_BSV = torch.log_softmax(torch.from_numpy(found["logits"]).double(), -1)[:, :-1]
    wanted_BSV = torch.log_softmax(wanted.double(), -1)[:, :-1]
    kl_BS = (wanted_BSV.exp() * (wanted_BSV - given_BSV)).sum(-1)
    assert float(kl_BS.mean()) == pytest.approx(report.loss.mean_kl, rel=1e-4)
    nll = -given_BSV.gather(2, torch.from_numpy(ids)[:, 1:, None]).mean()
    assert float(nll.exp()) == pytest.approx(report.loss.perplexity, rel=1e-5)
    assert found["text"].shape == (1, 40)


def test_our_own_layout_beside_it_is_what_it_would_be_alone(cut: Any, tmp_path: Path) -> None:
    source, report = cut
    own = compress(source, tmp_path / "own", rank=report.rank, rope_dim=12, context=256)
    assert own.loss is not None
    assert report.beside["own"].mean_kl == pytest.approx(own.loss.mean_kl, rel=1e-6)
    assert report.cached_values == own.cached_values
    # One channel of 32 and one table for all layers is what it costs.
    assert own.loss.mean_kl < report.loss.mean_kl < 1.2 * own.loss.mean_kl
    told = json.loads((report.path / "compress.json").read_text(encoding="utf-8"))
    assert told["layout"] == "deepseek" and set(told["beside"]) == {"own"}


def test_exported_absorbed_and_validated_like_any_deepseek(cut: Any, tmp_path: Path) -> None:
    _, report = cut
    bundle = export(report.path, tmp_path / "bundle")
    assert bundle.manifest["rewrite"]["decode"]["absorb_projections"] == 2
    checked = validate(bundle, source=report.path, threads=1)
    assert checked.passed, [case.failures for case in checked.cases if not case.passed]


def test_quantised(cut: Any, tmp_path: Path) -> None:
    _, report = cut
    bundle = export(report.path, tmp_path / "bundle", weights="int8", cache_dtype="int8")
    checked = validate(bundle, source=report.path, threads=1)
    assert not [case.failures for case in checked.cases if not case.passed]


def test_transmla_needs_no_table_but_thetas(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source")
    report = compress(source, tmp_path / "out", layout="deepseek", beside="own",
                      rank=32, method="transmla", context=256)  # fmt: skip
    rope = fields_of(tmp_path / "out")["rope_parameters"]
    assert rope == {"rope_type": "default", "rope_theta": 10000.0}
    assert report.loss is not None
    assert report.loss.mean_kl == pytest.approx(report.beside["own"].mean_kl, rel=0.1)


def test_half_precision_costs_what_it_costs_our_own_layout(tmp_path: Path) -> None:
    """The large constant takes nothing from the channels beside it."""
    source = write_llama(tmp_path / "source", tokenizer=False)
    ids = torch.randint(0, 2048, (4, 300), generator=torch.Generator().manual_seed(7))
    wanted_BSV = torch.log_softmax(logits(source, ids)[0].double(), -1)
    for layout in ("own", "deepseek"):
        compress(source, tmp_path / layout, layout=layout)
    for dtype in (torch.bfloat16, torch.float16):
        own, other = (
            float((wanted_BSV.exp() * (wanted_BSV - log_probabilities(folder, ids, dtype))).sum())
            for folder in (tmp_path / "own", tmp_path / "deepseek")
        )
        assert 0 < other < 1.5 * own


def log_probabilities(folder: Path, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        return torch.log_softmax(model.eval()(input_ids=ids).logits.double(), -1)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "an unknown layout": ({}, {"layout": "llama"}, "CMP-LAYOUT"),
    "an unknown one beside": ({}, {"beside": "llama"}, "CMP-LAYOUT"),
    "beside itself": ({}, {"layout": "deepseek", "beside": "deepseek"}, "CMP-LAYOUT"),
    "MLP biases and an odd rank": (
        {"mlp_bias": True}, {"layout": "deepseek", "rank": 33, "rope_dim": 16}, "CMP-RANK",
    ),
    "MLP biases and odd heads": (
        {"use_bias": True, "hidden_size": 50}, {"layout": "deepseek"}, "CMP-LAYOUT",
    ),
    "a budget": ({}, {"layout": "deepseek", "budget": 0.5}, "CMP-LAYOUT"),
    "a rank above what there is": (
        {}, {"layout": "deepseek", "rank": 49, "rope_dim": 16}, "CMP-RANK",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str, tmp_path: Path) -> None:
    fields, options, code = REFUSED[what]
    family = "Ernie4_5" if "use_bias" in fields else "Llama"
    source = write_llama(tmp_path / "source", family, **fields)
    with pytest.raises(InputError, match=code):
        compress(source, tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_every_layer_is_surveyed_before_one_is_written(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source")
    heard: list[str] = []
    options: dict[str, Any] = {"layout": "deepseek", "rank": 32, "rope_dim": 12, "context": 256}

    def told(stage: str, done: int, total: int) -> None:
        heard.append(f"{stage} {done}/{total}")

    compress(source, tmp_path / "out", progress=told, **options)
    assert heard == [f"{stage} {n}/2" for stage in ("statistics", "layers") for n in range(3)]


def test_statistics_that_are_too_large_to_keep_are_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_llama(tmp_path / "source")
    options: dict[str, Any] = {"layout": "deepseek", "rank": 32, "rope_dim": 12, "context": 256}
    kept = compress(source, tmp_path / "kept", **options)
    monkeypatch.setattr("mla_deploy.compress.survey._MOST_KEPT_BYTES", 0)
    again = compress(source, tmp_path / "again", **options)
    assert kept.loss == again.loss and len(kept.views) == len(again.views) == 2
