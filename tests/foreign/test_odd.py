"""Forms beyond the list of exporters: odd spellings, disguised graphs, and what is no MLA."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mla_deploy import rewrite_model
from mla_deploy.errors import InputError
from mla_deploy.foreign.survey import survey_foreign
from tests.foreign.disguise import DISGUISES, disguised
from tests.foreign.graph import run_steps, token_ids
from tests.foreign.odd import NOT_MLA, ODD, odd_graph
from tests.foreign.sources import source_logits
from tests.foreign.stored import stored_graph
from tests.foreign.written import written_graph

_LENGTHS = (5, 1, 1, 3)


@pytest.mark.parametrize("name", ODD)
def test_an_odd_spelling_is_rewritten(name: str, tmp_path: Path) -> None:
    graph, (_, spelling) = odd_graph(tmp_path, name), ODD[name]
    batch = 1 if spelling.batch == "one" else 2
    close = 0.05 if spelling.dtype == "fp16" else 2e-5
    said = source_logits(graph.source, token_ids(batch, sum(_LENGTHS)))
    assert np.abs(run_steps(graph, _LENGTHS, batch) - said).max() < close
    proof = rewrite_model(graph.path, tmp_path / "bundle").manifest["rewritten"]["proof"]
    assert proof["max_abs"] < (0.1 if spelling.dtype == "fp16" else 1e-4)
    assert proof["calls"] >= 9


@pytest.mark.parametrize("name", DISGUISES)
@pytest.mark.parametrize("base", ["gemm", "optimum"])
def test_a_disguised_graph_is_rewritten(base: str, name: str, tmp_path: Path) -> None:
    """Weights in halves or in int8 are weights all the same: the graph computes in fp32."""
    plain = stored_graph(base) if base == "optimum" else written_graph(tmp_path, base)
    if base == "optimum" and name.startswith("opset"):
        plain = stored_graph("torch-cached-18-half-rope")  # onnx converts no Reshape of optimum's
    graph = disguised(plain, name, tmp_path)
    bundle = rewrite_model(graph.path, tmp_path / "bundle")
    assert bundle.manifest["rewritten"]["proof"]["max_abs"] < 1e-4
    assert bundle.manifest["cache"]["dtype"] == "fp32"


@pytest.mark.parametrize("name", NOT_MLA)
def test_what_is_not_mla_is_refused_with_the_step(name: str, tmp_path: Path) -> None:
    graph, step = odd_graph(tmp_path, name), NOT_MLA[name][1]
    layers = survey_foreign(graph.path).layers
    assert [(layer.rank, layer.step) for layer in layers] == [(None, step)] * 2
    assert all(layer.stopped_at and layer.reason for layer in layers)
    with pytest.raises(InputError) as refusal:
        rewrite_model(graph.path, tmp_path / "bundle")
    assert refusal.value.code in ("REW-NO-MLA", "REW-LAYER")
    assert not (tmp_path / "bundle").exists()


def test_an_absorbed_graph_has_no_fault_left(tmp_path: Path) -> None:
    survey = survey_foreign(odd_graph(tmp_path, "absorbed").path)
    assert survey.is_mla and survey.cache == "latent" and survey.faults == ()
