"""What a budget wrote goes the way of any checkpoint, and its bundle loses what the report says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mla_deploy import compress, export, plan, validate
from mla_deploy.compress.report import CompressReport
from mla_deploy.compress.text import rations
from mla_deploy.runtime.sessions import GraphSessions
from mla_deploy.validate.loss import Scorer, loss_over
from tests.compress.llamas import TINY, write_llama

# The first is exact but for its cache, the second has widths of its own in each layer.
BUDGETS = {"uniform": "60%", "by layer": "45%"}


@pytest.fixture(scope="module", params=BUDGETS)
def compressed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> CompressReport:
    folder = tmp_path_factory.mktemp("budget")
    source = write_llama(folder / "source", last_layer=0.02)
    return compress(source, folder / "out", budget=BUDGETS[request.param], context=256)


def test_exported_absorbed_validated_planned(compressed: CompressReport, tmp_path: Path) -> None:
    widths = [(each.rank, each.rope) for each in compressed.form.layers]
    assert (len(set(widths)) > 1) == (compressed.budget == 0.45)
    cache = str(compressed.form.cache)
    bundle = export(compressed.path, tmp_path / "bundle")
    assert bundle.manifest["cache"]["dtype"] == cache
    counts = bundle.manifest["rewrite"]["decode"]
    assert any("absorb" in name and fired == 2 for name, fired in counts.items()), counts
    report = validate(bundle, source=compressed.path, threads=1)
    assert report.passed, [case.failures for case in report.cases if not case.passed]
    # The bytes that were promised are those of the bound tensors.
    assert bundle.manifest["cache"]["bytes_per_token"] == compressed.cached_bytes
    planned = plan(compressed.path, device="cpu", context=256)
    assert planned.devices[0].memory.cache_bytes == 256 * compressed.cached_bytes


def test_the_bundle_loses_what_the_report_says(compressed: CompressReport, tmp_path: Path) -> None:
    """Prefilled and decoded through both graphs, against the source that was compressed."""
    bundle = export(compressed.path, tmp_path / "bundle")
    tokenizer = {"tokenizer.json": (TINY / "tokenizer.json").read_bytes()}
    judged = rations(tokenizer, None, vocab=2048, context=256, calibrates=True, chooses=True).judged
    found = loss_over("text", judged, _scorer(compressed), GraphSessions(bundle, 1))
    told = compressed.loss
    assert told is not None
    # The bundle is judged on the second halves of the rows: half of the tokens.
    assert found.mean_kl == pytest.approx(told.mean_kl, rel=0.15)
    assert found.top1 == pytest.approx(told.top1, abs=0.05)


def _scorer(compressed: CompressReport) -> Scorer:
    import torch
    import transformers

    folder = compressed.path.parent / "source"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def score(row: tuple[int, ...]) -> Any:
        with torch.no_grad():
            return model(input_ids=torch.tensor([row])).logits[0].numpy()

    return score
