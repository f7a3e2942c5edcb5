"""A compressed checkpoint goes the way of any other: exported, absorbed, validated, quantised."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mla_deploy import build, compress, export, generate, open_runner, plan, validate
from tests.compress.llamas import write_llama

FORMS: dict[str, dict[str, Any]] = {
    "exact": {},
    "low-rank": {"rank": 32, "rope_dim": 12, "context": 256},
}


@pytest.fixture(scope="module", params=FORMS)
def compressed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compressed")
    source = write_llama(folder / "source", attention_bias=True)
    return compress(source, folder / "out", **FORMS[request.param]).path


def test_exported_and_equal_to_its_own_class(compressed: Path, tmp_path: Path) -> None:
    bundle = export(compressed, tmp_path / "bundle")
    counts = bundle.manifest["rewrite"]["decode"]
    assert any("absorb" in name and fired == 2 for name, fired in counts.items()), counts
    report = validate(bundle, source=compressed, threads=1)
    assert report.passed, [case.failures for case in report.cases if not case.passed]


def test_quantised(compressed: Path, tmp_path: Path) -> None:
    bundle = export(compressed, tmp_path / "bundle", weights="int8", cache_dtype="int8")
    report = validate(bundle, source=compressed, threads=1)
    assert not [case.failures for case in report.cases if not case.passed]


def test_a_tensorrt_graph(compressed: Path, tmp_path: Path) -> None:
    bundle = export(compressed, tmp_path / "bundle", target="rtx-40")
    report = validate(bundle, source=compressed, threads=1)
    assert not [case.failures for case in report.cases if not case.passed]


def test_transformers_takes_it_as_any_checkpoint(compressed: Path, tmp_path: Path) -> None:
    """Auto classes, a round trip, and the same 128 greedy tokens from the absorbed graphs."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(compressed).eval()
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again").eval()
    prompt = [5, 99, 1203, 7, 42]
    with torch.no_grad():
        both = [each(input_ids=torch.tensor([prompt])).logits for each in (model, again)]
        assert torch.equal(*both)
        told = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=128, do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    wanted = told[0, len(prompt) :].tolist()
    assert len(wanted) == 128
    for folder, name in ((compressed, "bundle"), (tmp_path / "again", "bundle-again")):
        bundle = export(folder, tmp_path / name)
        runner = open_runner(bundle, capacity=160, threads=1)
        assert list(generate(runner, prompt, 128)) == wanted


@pytest.mark.parametrize("target", ["h100", "jetson-orin-jp6"])
def test_a_graph_for_a_device(compressed: Path, tmp_path: Path, target: str) -> None:
    bundle = export(compressed, tmp_path / "bundle", target=target)
    assert bundle.manifest["target"] == target
    report = validate(bundle, source=compressed, threads=1)
    assert not [case.failures for case in report.cases if not case.passed]


def test_planned(compressed: Path) -> None:
    report = plan(compressed, device="orin-nano-8,h100", context=256)
    assert all(each.fits for each in report.devices)
    config = transformers.AutoConfig.from_pretrained(compressed)
    row = config.kv_lora_rank + config.qk_rope_head_dim
    assert {each.memory.cache_bytes for each in report.devices} == {2 * 2 * 256 * row}


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)
def test_engines_are_built(compressed: Path, tmp_path: Path) -> None:
    export(compressed, tmp_path / "bundle", target="rtx-40", capacity=64)
    made = build(tmp_path / "bundle", profiles=["decode:batch=1,capacity=64"])
    assert made.bundle.engine is not None
