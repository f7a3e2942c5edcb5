"""Every form of every exporter rewritten: the latent is cached, and torch says the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from mla_deploy import open_runner, rewrite_model
from mla_deploy.bundle import Bundle
from mla_deploy.errors import BusyError, GateError, IncompatibleError, InputError
from tests.foreign.graph import ForeignGraph, run_steps, token_ids
from tests.foreign.sources import source_logits
from tests.foreign.stored import stored_graph, stored_names
from tests.foreign.written import SPELLINGS, written_graph

_LENGTHS = (5, 1, 1, 3)
_CLOSE = 1e-4
_ROW = (20 + 8) * 2  # L + R of the presets, two layers


def _logits(bundle: Bundle, ids_BT: np.ndarray) -> list[np.ndarray]:
    """The bundle's logits after each of `_LENGTHS` more tokens."""
    runner = open_runner(bundle, batch=ids_BT.shape[0], capacity=64)
    found, start = [], 0
    for length in _LENGTHS:
        part = ids_BT[:, start : start + length]
        found.append(runner.prefill([row.tolist() for row in part]))
        start += length
    return found


def _require_equal(bundle: Bundle, graph: ForeignGraph, bound: float = _CLOSE) -> None:
    """Held against the graph as it came, and the cache against the size of its rows."""
    ids_BT = token_ids(2, sum(_LENGTHS))
    whole_BTV = run_steps(graph, _LENGTHS)
    ends = np.cumsum(_LENGTHS) - 1
    for logits_BV, end in zip(_logits(bundle, ids_BT), ends, strict=True):
        assert np.abs(logits_BV - whole_BTV[:, end]).max() < bound
    cache = bundle.manifest["cache"]
    assert cache["bytes_per_token"] == _ROW * cache["itemsize"]
    inputs = {value["name"]: value["shape"] for value in bundle.manifest["io"]["decode"]["inputs"]}
    assert inputs["latent_cache.0"] == ["batch", 1, "capacity", _ROW // 2]
    assert sorted(inputs) == [
        "cache_lengths", "input_ids", "latent_cache.0", "latent_cache.1", "new_lengths",
    ]  # fmt: skip
    assert bundle.manifest["rewrite"]["decode"]["absorb_projections"] == 2


@pytest.mark.parametrize("name", stored_names())
def test_a_graph_of_an_exporter(name: str, tmp_path: Path) -> None:
    graph = stored_graph(name)
    bundle = rewrite_model(graph.path, tmp_path / "bundle")
    _require_equal(bundle, graph)
    proof = bundle.manifest["rewritten"]["proof"]
    assert proof["max_abs"] < _CLOSE and proof["calls"] >= 9


def test_the_rewritten_graph_says_what_torch_says(tmp_path: Path) -> None:
    bundle = rewrite_model(stored_graph("transformers-decode").path, tmp_path / "bundle")
    ids_BT = token_ids(2, sum(_LENGTHS))
    wanted_BTV = source_logits("v3-yarn", ids_BT)
    for logits_BV, end in zip(_logits(bundle, ids_BT), np.cumsum(_LENGTHS) - 1, strict=True):
        assert np.abs(logits_BV - wanted_BTV[:, end]).max() < _CLOSE


_WRITTEN = [name for name, spelling in SPELLINGS.items() if spelling.batch == "free"]


@pytest.mark.parametrize("name", _WRITTEN)
def test_a_graph_that_a_person_wrote(name: str, tmp_path: Path) -> None:
    graph = written_graph(tmp_path, name)
    bundle = rewrite_model(graph.path, tmp_path / "bundle")
    is_half = SPELLINGS[name].dtype == "fp16"
    assert bundle.manifest["dtype"] == ("fp16" if is_half else "fp32")
    _require_equal(bundle, graph, bound=0.1 if is_half else _CLOSE)


@pytest.mark.parametrize(
    "options",
    [
        {"cache": "growing"},
        {"cache_layout": "split"},
        {"all_logits": True},
        {"dtype": "bf16"},
        {"cache_dtype": "fp16"},
    ],
    ids=lambda options: "-".join(options),
)
def test_the_options_of_export(options: dict[str, object], tmp_path: Path) -> None:
    graph = stored_graph("optimum")
    bundle = rewrite_model(graph.path, tmp_path / "bundle", **options)  # type: ignore[arg-type]
    manifest = bundle.manifest
    cache = manifest["cache"]
    told = {"cache": cache["kind"], "cache_layout": cache["layout"], "dtype": manifest["dtype"],
            "cache_dtype": cache["dtype"], "all_logits": manifest["all_logits"]}  # fmt: skip
    assert {name: told[name] for name in options} == options
    proof = manifest["rewritten"]["proof"]
    assert (proof["rel_l2"] if "dtype" in str(options) else proof["max_abs"]) <= proof["bound"]


def test_a_full_head_cache_is_told_as_what_it_was(tmp_path: Path) -> None:
    """optimum caches 4 heads of 24 + 12 numbers where the latent is 28."""
    bundle = rewrite_model(stored_graph("optimum").path, tmp_path / "bundle")
    before = bundle.manifest["rewritten"]["cached_before"]
    assert before > 5 * bundle.manifest["cache"]["bytes_per_token"]


def test_a_fixed_number_of_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as refusal:
        rewrite_model(written_graph(tmp_path, "fixed-batch").path, tmp_path / "bundle")
    assert refusal.value.code == "REW-FIXED"
    assert not (tmp_path / "bundle").exists()


def test_a_tampered_layer_is_named_with_its_node(tmp_path: Path) -> None:
    """Layer 1's scores go through a Tanh: no attention that is known."""
    path = _changed(tmp_path, "torch-18-eager", _softened)
    with pytest.raises(InputError) as refusal:
        rewrite_model(path, tmp_path / "bundle")
    assert refusal.value.code == "REW-LAYER"
    (layer,) = refusal.value.details["layers"]  # type: ignore[misc]
    assert (layer["layer"], layer["step"], layer["node"]) == (1, "scores", "Tanh 'tampered'")
    assert not (tmp_path / "bundle").exists()


def test_a_graph_that_counts_tokens_elsewhere_does_not_pass_the_proof(tmp_path: Path) -> None:
    """Hidden states of the token before are added: nothing in attention shows it."""
    path = _changed(tmp_path, "torch-18-eager", _shifted)
    with pytest.raises(GateError) as refusal:
        rewrite_model(path, tmp_path / "bundle")
    assert refusal.value.code == "REW-PROOF"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model.onnx"]


def test_positions_that_are_read_in_another_way_are_named(tmp_path: Path) -> None:
    path = _changed(tmp_path, "torch-18-eager", _sloped)
    with pytest.raises(InputError) as refusal:
        rewrite_model(path, tmp_path / "bundle")
    assert refusal.value.code == "REW-POSITION"
    assert "PRelu" in refusal.value.message


def test_a_graph_that_does_not_run_is_not_rewritten(tmp_path: Path) -> None:
    def unknown(graph: onnx.GraphProto) -> None:
        graph.node.add(
            op_type="NoKernel", domain="com.microsoft", input=["input_ids"], output=["nothing"]
        )

    with pytest.raises(IncompatibleError) as refusal:
        rewrite_model(_changed(tmp_path, "torch-18-eager", unknown), tmp_path / "bundle")
    assert refusal.value.code == "REW-SESSION"


def test_an_output_that_is_there_is_told_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "mine").touch()
    with pytest.raises(BusyError) as refusal:
        rewrite_model(tmp_path / "none.onnx", tmp_path / "bundle")
    assert refusal.value.code == "BUN-EXISTS"


def _changed(folder: Path, name: str, change: object) -> Path:
    model = onnx.load(str(stored_graph(name).path))
    change(model.graph)  # type: ignore[operator]
    path = folder / "model.onnx"
    onnx.save(model, str(path))
    return path


def _softened(graph: onnx.GraphProto) -> None:
    softmaxes = [node for node in graph.node if node.op_type == "Softmax"]
    place = list(graph.node).index(softmaxes[1])
    node = onnx.NodeProto(
        op_type="Tanh", name="tampered", input=[softmaxes[1].input[0]], output=["tampered_scores"]
    )
    softmaxes[1].input[0] = "tampered_scores"
    graph.node.insert(place, node)


def _shifted(graph: onnx.GraphProto) -> None:
    """embedding + embedding of the token before."""
    gather = next(node for node in graph.node if node.op_type == "Gather" and
                  "input_ids" in node.input)  # fmt: skip
    place, found = list(graph.node).index(gather), gather.output[0]
    for node in graph.node:
        node.input[:] = ["mixed" if name == found else name for name in node.input]
    gather.output[0] = found
    for name, values in (("pads", [0, 1, 0, 0, 0, 0]), ("first", [0]), ("last", [-1]),
                         ("axis", [1])):  # fmt: skip
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(values), f"t_{name}"))
    nodes = [
        onnx.NodeProto(op_type="Slice", input=[found, "t_first", "t_last", "t_axis"],
                       output=["t_cut"]),
        onnx.NodeProto(op_type="Pad", input=["t_cut", "t_pads"], output=["t_before"]),
        onnx.NodeProto(op_type="Add", input=[found, "t_before"], output=["mixed"]),
    ]  # fmt: skip
    for node in reversed(nodes):
        graph.node.insert(place + 1, node)


def _sloped(graph: onnx.GraphProto) -> None:
    """PRelu of the embedding, its slope the place of the token."""
    gather = next(node for node in graph.node if node.op_type == "Gather" and
                  "input_ids" in node.input)  # fmt: skip
    place, found = list(graph.node).index(gather), gather.output[0]
    for node in graph.node:
        node.input[:] = ["sloped" if name == found else name for name in node.input]
    for name, values in (("zero", 0), ("one", 1), ("last", [1])):
        graph.initializer.append(
            onnx.numpy_helper.from_array(np.array(values, dtype=np.int64), f"s_{name}")
        )
    shape = onnx.NodeProto(op_type="Shape", input=["input_ids"], output=["s_shape"])
    nodes = [
        shape,
        onnx.NodeProto(op_type="Gather", input=["s_shape", "s_one"], output=["s_new"]),
        onnx.NodeProto(op_type="Range", input=["s_zero", "s_new", "s_one"], output=["s_places"]),
        onnx.NodeProto(op_type="CastLike", input=["s_places", found], output=["s_floats"]),
        onnx.NodeProto(op_type="Unsqueeze", input=["s_floats", "s_last"], output=["s_slope"]),
        onnx.NodeProto(op_type="PRelu", input=[found, "s_slope"], output=["sloped"]),
    ]
    for node in reversed(nodes):
        graph.node.insert(place + 1, node)
