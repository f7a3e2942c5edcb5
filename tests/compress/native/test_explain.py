"""The whole report: numbers, page, verb, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from mla_deploy.cli.explanations import explained
from mla_deploy.cli.native_sheets import native_sheets, native_words
from mla_deploy.cli.output import Screen
from mla_deploy.compress.native import explain_native
from mla_deploy.compress.native.page import native_page
from mla_deploy.errors import InputError
from mla_deploy.shapes import byte_text
from tests.compress.llamas import TINY, write_llama
from tests.compress.test_page import Balanced
from tests.tiny import write_tiny


@pytest.fixture(scope="module")
def measured() -> Any:
    """Of the trained model, on as little text as is taken."""
    return explain_native(TINY, tokens=512).to_dict()


@pytest.fixture(scope="module")
def weights_alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("native") / "m"
    return explain_native(write_tiny(folder, "deepseek_v2", num_attention_heads=40)).to_dict()


def by_name(report: Any) -> dict[str, Any]:
    return {row["name"]: row for row in report["forms"]}


def test_what_the_trained_model_shows(measured: Any) -> None:
    json.dumps(measured, allow_nan=False)
    assert len(measured["sites"]) == 4
    for site in measured["sites"]:
        seen = site["on_text"]
        # 64 channels of which a text uses few, and its readers fewer: the weights know neither.
        assert 1 < seen["readers_rank"] < seen["effective_rank"] < site["weights_rank"] < 64
        assert site["ratio"] == 6 * (32 + 24) / 64
        for curve in (seen["energy"], seen["readers_energy"], site["weight_energy"]):
            shares = [share for _, share in curve]
            assert shares == sorted(shares) and shares[-1] == pytest.approx(1.0)
        assert 0.5 < min(seen["half_key_cosine"] + seen["half_value_cosine"]) <= 1
    forms = by_name(measured)
    cuts = [forms[f"{share} rank"]["loss"]["mean_kl"] for share in ("1/4", "1/2", "3/4")]
    assert cuts == sorted(cuts, reverse=True)
    assert forms["int8"]["loss"]["mean_kl"] < forms["int4"]["loss"]["mean_kl"] < cuts[0]
    # Axes whitened each by themselves cost every reader the same: the worst way to store.
    assert forms["int4 pca"]["loss"]["mean_kl"] > forms["int4 channel"]["loss"]["mean_kl"]
    assert {row["loss"]["tokens"] for row in measured["forms"]} == {510}


def test_the_best_are_the_best(measured: Any) -> None:
    forms, kept = by_name(measured), measured["frontier"]
    for name in kept:
        mine = forms[name]
        assert not [
            other
            for other in forms.values()
            if other["token_bytes"] <= mine["token_bytes"]
            and other["loss"]["mean_kl"] < mine["loss"]["mean_kl"]
        ]
    smallest = forms[measured["smallest_exported"]]
    assert smallest["export"] and smallest["loss"]["verdict"] in ("exact", "minor")
    assert forms["int4 hadamard"]["export"] == "--cache-dtype int4 --rotate-latent"
    assert [forms[n]["cost"] for n in ("int8 pca", "int8 matched", "1/2 rank")] == [
        "nothing", "a product a token", "a product a token",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["measured", "weights_alone"])
def test_the_page_is_whole_and_says_the_numbers(kind: str, request: Any) -> None:
    report = request.getfixturevalue(kind)
    text = native_page(report).decode("utf-8")
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert not re.search(r"(?:src|href|url)\s*[=(]", text)
    shown = " ".join(parser.texts)
    for row in report["forms"]:
        assert row["name"] in shown and f"{row['token_bytes']:,}" in shown
        assert row["loss"] is None or f"{row['loss']['mean_kl']:.2g}" in shown
    assert byte_text(report["forms"][0]["token_bytes"] * 32768) in shown
    assert ("Not measured" in shown) == (kind == "weights_alone")
    assert ("2 heads a cell" in shown) == (kind == "weights_alone")
    sheets = native_sheets(report)
    assert len(sheets[0].rows) == len(report["forms"])


def test_hostile_names_are_escaped(measured: Any) -> None:
    evil = "<script>alert(1)</script>"
    text = native_page({**measured, "path": evil, "text": evil, "notes": [evil]}).decode("utf-8")
    assert evil not in text and "&lt;script&gt;" in text


def test_no_good_form_is_no_success(measured: Any) -> None:
    bad = {**measured, "smallest_exported": None, "smallest": None}
    assert b'<header class="no">' in native_page(bad)
    assert "no form" in native_words(bad)


def test_without_a_tokenizer_weights_are_looked_at(weights_alone: Any) -> None:
    assert weights_alone["text"] is None
    assert all(row["loss"] is None for row in weights_alone["forms"])
    assert all(site["on_text"] is None for site in weights_alone["sites"])
    assert any("no tokenizer.json" in note for note in weights_alone["notes"])
    assert "nothing was measured" in native_words(weights_alone)


def test_the_verb_writes_the_page(weights_alone: Any, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    outcome = explained(Screen(), Path(weights_alone["path"]), page, {})
    assert outcome.result["kind"] == "native"
    assert page.read_bytes() == native_page(outcome.result)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html"]


def test_options_that_do_not_belong_are_usage_errors(tmp_path: Path) -> None:
    from mla_deploy.cli.compress import compress

    source = write_tiny(tmp_path / "m", "youtu")
    for more in (["--rank", "8"], ["--out", str(tmp_path / "o")]):
        found = CliRunner().invoke(compress, [str(source), "--explain", *more], obj=Screen())
        assert found.exit_code == 2, found.output
    found = CliRunner().invoke(compress, [str(source), "--tokens", "600"], obj=Screen())
    assert found.exit_code == 2


def with_tokenizer(folder: Path) -> Path:
    shutil.copy(TINY / "tokenizer.json", folder / "tokenizer.json")
    return folder


def test_what_is_refused(tmp_path: Path) -> None:
    plain = write_llama(tmp_path / "llama", tokenizer=False)
    mla = write_tiny(tmp_path / "m", "youtu")
    text = tmp_path / "text.txt"
    text.write_text("In the beginning. " * 20)
    for code, given, options in (
        ("CMP-NATIVE", plain, {}),
        ("CMP-TEXT", mla, {"calibrate": text}),  # nothing to read it with
        ("CMP-TEXT", TINY, {"calibrate": text}),  # too short
        ("CMP-TEXT", with_tokenizer(write_tiny(tmp_path / "n", "youtu")), {}),  # another's
        ("CMP-TOKENS", TINY, {"tokens": 100}),
    ):
        with pytest.raises(InputError, match=code) as caught:
            explain_native(given, **options)
        assert caught.value.hint


def with_gain(folder: Path, part: str, gain: float) -> Path:
    """A small model one of whose norms multiplies by `gain`."""
    made = with_tokenizer(write_tiny(folder, "youtu", vocab_size=2048))
    tensors = load_file(made / "model.safetensors")
    name = next(name for name in tensors if part in name)
    tensors[name] = torch.full_like(tensors[name], gain)
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    return made


@pytest.mark.parametrize(
    ("part", "told"), [("0.self_attn.kv_a_layernorm", "layers.0"), ("model.norm", "logits")]
)
def test_a_model_that_overflows_is_refused(tmp_path: Path, part: str, told: str) -> None:
    with pytest.raises(InputError, match="CMP-NONFINITE") as caught:
        explain_native(with_gain(tmp_path / "m", part, 3e38), tokens=512)
    assert told in caught.value.message


def test_a_form_in_which_a_model_overflows_is_left_out(tmp_path: Path) -> None:
    """Latents beyond what 16 bits hold: codes have scales, and hold them."""
    report = explain_native(
        with_gain(tmp_path / "m", "0.self_attn.kv_a_layernorm", 1e5), tokens=512
    )
    told = report.to_dict()
    assert "16 bits" not in by_name(told) and "int8" in by_name(told)
    assert any(note.startswith("16 bits is left out") for note in told["notes"])
    native_page(told)
