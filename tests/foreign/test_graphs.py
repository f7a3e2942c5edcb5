"""The graphs of other exporters say what torch says, through their own caches."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.foreign.graph import ForeignGraph, run_steps, token_ids
from tests.foreign.sources import source_logits
from tests.foreign.stored import described, stored_graph, stored_names, write_here
from tests.foreign.written import SPELLINGS, written_graph

_LENGTHS = (5, 1, 1, 3)
_CLOSE = 2e-5
# mobius leaves `mscale_all_dim` out of the softmax scale, so its graph differs from torch.
_OFF = {"mobius"}


def _difference(graph: ForeignGraph, source: str) -> float:
    ids_BT = token_ids(2, sum(_LENGTHS))
    found = run_steps(graph, _LENGTHS)
    wanted = source_logits(source, ids_BT)
    assert np.abs(wanted).max() > 0.5
    return float(np.abs(found - wanted).max())


@pytest.mark.parametrize("name", stored_names())
def test_a_stored_graph_says_what_torch_says(name: str) -> None:
    graph = stored_graph(name)
    difference = _difference(graph, graph.source)
    if name in _OFF:
        assert difference > 0.1
    else:
        assert difference < _CLOSE


def test_no_stored_graph_says_where_it_was_made() -> None:
    for name in stored_names():
        content = stored_graph(name).path.read_bytes()
        assert b"site-packages" not in content and b"/home" not in content, name


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["torch-23-attention", "transformers-decode"])
def test_the_exporter_of_today_writes_the_stored_form(name: str, tmp_path: Path) -> None:
    """The same operators, the same number of times, and the same logits."""
    made = tmp_path / "model.onnx"
    write_here(made, name)
    stored = stored_graph(name)
    assert _operators(made) == _operators(stored.path)
    assert _difference(described(made), stored.source) < _CLOSE


def _operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(str(path)).graph.node)


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_written_graph_says_what_torch_says(name: str, tmp_path: Path) -> None:
    graph = written_graph(tmp_path, name)
    assert _difference(graph, graph.source) < (0.05 if "fp16" in name else _CLOSE)
