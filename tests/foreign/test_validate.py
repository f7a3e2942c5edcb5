"""`validate` with the ONNX file as source: every case and every cached row, on ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import pytest

from mla_deploy import rewrite_model, validate
from mla_deploy.errors import InputError, IntegrityError
from tests.foreign.stored import stored_graph
from tests.foreign.written import written_graph


@pytest.mark.parametrize("name", ["transformers-decode", "optimum", "torch-18-eager"])
def test_a_rewritten_bundle_equals_its_graph(name: str, tmp_path: Path) -> None:
    path = stored_graph(name).path
    report = validate(rewrite_model(path, tmp_path / "bundle"), source=path)
    assert report.passed, [case.failures for case in report.cases if case.failures]
    assert len(report.cases) > 10
    assert all(case.cache is not None for case in report.cases)


def test_a_graph_with_functions_and_tables_of_few_positions(tmp_path: Path) -> None:
    graph = written_graph(tmp_path, "function")
    bundle = rewrite_model(graph.path, tmp_path / "bundle")
    assert bundle.manifest["model"]["max_position_embeddings"] == 128
    assert bundle.manifest["cache"]["capacity"] == 128
    assert validate(bundle, source=graph.path).passed


def test_another_graph_is_not_its_source(tmp_path: Path) -> None:
    bundle = rewrite_model(stored_graph("optimum").path, tmp_path / "bundle")
    with pytest.raises(IntegrityError) as refusal:
        validate(bundle, source=stored_graph("mobius").path)
    assert refusal.value.code == "VAL-SOURCE"


def test_half_precision_is_not_compared_with_a_graph(tmp_path: Path) -> None:
    path = stored_graph("optimum").path
    bundle = rewrite_model(path, tmp_path / "bundle", dtype="fp16")
    with pytest.raises(InputError) as refusal:
        validate(bundle, source=path)
    assert refusal.value.code == "VAL-OPTION"
