"""The tiny checkpoints are fit for testing: transformers runs them, and their logits tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import TINY_PRESETS, VOCAB_SIZE, tiny_model, write_preset, write_tiny

IDS = torch.arange(3, 51)[None]  # 48 positions: past the original length of the scaled ropes


@torch.no_grad()
def logits_of(family: str, **options: Any) -> torch.Tensor:
    return tiny_model(family, **options)(IDS).logits[0]


@pytest.mark.parametrize("name", TINY_PRESETS)
def test_logits_are_not_degenerate(name: str) -> None:
    family, overrides = TINY_PRESETS[name]
    logits_SV = logits_of(family, **overrides)
    assert logits_SV.isfinite().all()
    assert 0.5 < logits_SV.std() < 5
    assert len(set(logits_SV.argmax(-1).tolist())) > 10
    top = logits_SV.topk(2).values
    assert (top[:, 0] - top[:, 1]).median() > 0.05


@pytest.mark.parametrize(
    ("family", "one", "other"),
    [
        ("deepseek_v3", "v3", "v3-half-rope"),
        ("deepseek_v3", "v3", "v3-yarn"),
        ("deepseek_v3", "v3-yarn", "v3-yarn-all-dim"),
        ("deepseek_v3", "v3", "v3-no-renorm"),
        ("deepseek_v3", "v3", "v3-llama3-rope"),
        ("deepseek_v2", "v2", "v2-groups"),
        ("minicpm3", "minicpm3", "minicpm3-longrope"),
    ],
)
def test_one_setting_moves_the_logits(family: str, one: str, other: str) -> None:
    """Same weights, one field: a reader that ignores the field is found out."""
    first = logits_of(family, **TINY_PRESETS[one][1])
    second = logits_of(family, **TINY_PRESETS[other][1])
    assert (first - second).abs().max() > 0.05


def test_the_same_bytes_every_time(tmp_path: Path) -> None:
    first, second = (write_tiny(tmp_path / name, dtype="bfloat16") for name in "ab")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
    other = write_tiny(tmp_path / "c", dtype="bfloat16", seed=1)
    assert (first / "config.json").read_bytes() == (other / "config.json").read_bytes()
    weights = "model.safetensors"
    assert (first / weights).read_bytes() != (other / weights).read_bytes()


def test_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = write_preset(tmp_path, "youtu", tokenizer=True)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() <= VOCAB_SIZE
    text = "every head reads the latent cache."
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
