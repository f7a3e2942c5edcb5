"""The graphs as files: what ONNX says of them, how they grow, that they are reproducible."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import inliner, shape_inference

from mla_deploy.export import export
from tests.exported import GROWING, HALF_SPLIT, PLAIN, exported
from tests.tiny import write_preset

GRAPHS = ("prefill", "decode")
FORMS: list[dict[str, Any]] = [PLAIN, HALF_SPLIT, GROWING, {"cache": "growing"}]
ROOT = Path(__file__).parents[2]


def graph_file(graph: str, **options: Any) -> Path:
    return exported(**options).bundle.path / f"{graph}.onnx"


def model_of(path: Path) -> onnx.ModelProto:
    return onnx.load(str(path), load_external_data=False)


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_checker_and_strict_shape_inference(graph: str, options: dict[str, Any]) -> None:
    path = graph_file(graph, **options)
    onnx.checker.check_model(str(path), full_check=True)
    shape_inference.infer_shapes(model_of(path), strict_mode=True, data_prop=True)


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_inferred_outputs_are_the_declared_ones(graph: str, options: dict[str, Any]) -> None:
    """From the inputs alone: types and static sizes come out as the graph says."""
    flat = inliner.inline_local_functions(model_of(graph_file(graph, **options)))
    declared = {v.name: v.type.tensor_type for v in flat.graph.output}
    sizes = {name: [d.dim_value for d in t.shape.dim] for name, t in declared.items()}
    types = {name: t.elem_type for name, t in declared.items()}
    for value in flat.graph.output:
        value.type.Clear()
    for value in shape_inference.infer_shapes(flat, strict_mode=True, data_prop=True).graph.output:
        found = value.type.tensor_type
        assert found.elem_type == types[value.name]
        for size, wanted in zip(found.shape.dim, sizes[value.name], strict=True):
            assert size.dim_value in (0, wanted)


@pytest.mark.parametrize("graph", GRAPHS)
def test_plain_operators_and_calls_only(graph: str) -> None:
    model = model_of(graph_file(graph))
    names = {function.name for function in model.functions}
    assert names == {"DecoderLayer0", "DecoderLayer1"}
    assert {f.domain for f in model.functions} == {"mla_deploy"}
    calls = [node.op_type for node in model.graph.node if node.domain == "mla_deploy"]
    assert calls == ["DecoderLayer0", "DecoderLayer1"]
    for function in model.functions:
        assert {node.domain for node in function.node} == {""}
        assert {(o.domain, o.version) for o in function.opset_import} <= {
            ("", 23),
            ("mla_deploy", 1),
        }
    assert {(o.domain, o.version) for o in model.opset_import} == {("", 23), ("mla_deploy", 1)}


@pytest.mark.parametrize("graph", GRAPHS)
def test_no_weight_is_transposed(graph: str) -> None:
    """A runtime would fold the Transpose into a private copy of the weight when it loads."""
    model = model_of(graph_file(graph))
    for body, weights in [
        (model.graph.node, {t.name for t in model.graph.initializer}),
        *((f.node, {n for n in f.input if n.startswith("layer.")}) for f in model.functions),
    ]:
        assert [n.op_type for n in body if n.op_type == "Transpose" and n.input[0] in weights] == []


@pytest.mark.parametrize("graph", GRAPHS)
def test_nothing_of_the_machine_is_in_the_graph(graph: str) -> None:
    """Tracers leave stack traces behind, with the paths of whoever exported."""
    data = graph_file(graph).read_bytes()
    for word in (b".py", b"site-packages", str(ROOT).encode(), os.fsencode(Path.home())):
        assert word not in data


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the preset `v3`, with six layers instead of two."""
    folder = tmp_path_factory.mktemp("depth")
    write_preset(folder / "checkpoint", "v3", num_hidden_layers=6)
    return export(folder / "checkpoint", folder / "bundle").path


@pytest.mark.parametrize("graph", GRAPHS)
def test_depth_adds_calls_and_nothing_else(deep: Path, graph: str) -> None:
    folders = (exported("v3").bundle.path, deep)
    two, six = (model_of(folder / f"{graph}.onnx") for folder in folders)
    bodies = [
        [f.SerializeToString(deterministic=True) for f in model.functions] for model in (two, six)
    ]
    assert bodies[0] == bodies[1]
    kinds = [[n.op_type for n in model.graph.node] for model in (two, six)]
    extra = kinds[1].copy()
    for kind in kinds[0]:
        extra.remove(kind)
    assert extra == ["DecoderLayer1"] * 4
    # Arguments of a call are names only: far below what a layer's nodes take.
    grown = six.ByteSize() - two.ByteSize()
    assert grown < 4 * 16_000


def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    """Traced anew with another hash seed: no order of a set, no clock, no path reaches a file."""
    made = exported()
    again = tmp_path / "again"
    code = "import sys; from mla_deploy import export; export(sys.argv[1], sys.argv[2])"
    command = [sys.executable, "-c", code, str(made.checkpoint), str(again)]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=300)
    names = sorted(path.name for path in made.bundle.path.iterdir())
    assert sorted(path.name for path in again.iterdir()) == names
    for name in names:
        assert (again / name).read_bytes() == (made.bundle.path / name).read_bytes(), name


def test_an_export_for_a_device_leaves_nothing_in_the_next(tmp_path: Path) -> None:
    """All of them are written from one trace, which is kept."""
    made = exported()
    export(made.checkpoint, tmp_path / "first")
    export(made.checkpoint, tmp_path / "device", target="rtx-40")
    export(made.checkpoint, tmp_path / "second")
    for name in ("prefill.onnx", "decode.onnx"):
        first, second = (tmp_path / part / name for part in ("first", "second"))
        assert first.read_bytes() == second.read_bytes(), name
