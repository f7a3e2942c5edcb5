"""Quantised weights of TensorRT bundles: right on a CPU, and built by TensorRT-RTX with no GPU."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

import mla_deploy
from mla_deploy.engine.lint import lint_graph
from mla_deploy.engine.pipeline import AuditMode
from mla_deploy.rewrite.releases import find_release
from mla_deploy.validate import Call, Case, validate
from mla_deploy.weight_forms.form import parse_plan
from tests.export.published_shapes import write_shape
from tests.exported import Exported, exported

TRAINED = Path(__file__).parents[2] / "models" / "tiny-deepseek-v3"
CASES = (
    Case("prompt", (Call(((5, 8, 2, 60, 33, 41, 7),)),)),
    Case("steps", (Call(((5, 8, 2),)), Call(((9,),), True), Call(((4,),), True)), "absorbed"),
)
FORMS = [
    ("rtx-40", "int4", "fp16"),
    ("rtx-40", "int4:mixed", "fp16"),
    ("jetson-orin-jp7", "int8:block=32", "fp16"),
    ("h100", "fp8:block=32", "bf16"),
    ("jetson-orin-jp6", "int8:block=channel", "fp16"),
]


def made_for(target: str, weights: str, dtype: str) -> Exported:
    return exported(
        "v3-all-dense", target=target, weights=weights, dtype=dtype, capacity=64
    )  # fmt: skip


def mixed_of(weights: str) -> set[str]:
    """The kinds that the graphs hold: those of what TensorRT quantises."""
    plan = parse_plan(weights)
    return {form.kind for role, form in plan.forms.items() if role != "embedding"}


@pytest.mark.parametrize(("target", "weights", "dtype"), FORMS)
def test_the_graphs_compute_with_the_rounded_weights(target: str, weights: str, dtype: str) -> None:
    made = made_for(target, weights, dtype)
    report = validate(made.bundle, source=made.checkpoint, cases=CASES, threads=1)
    assert {case.name: case.failures for case in report.cases if case.failures} == {}
    # Products are in float here: nothing but half precision separates them from the reference.
    assert max(case.logits.rel_l2 for case in report.cases if case.logits) < 3e-2
    assert report.loss is not None
    assert made.bundle.manifest["weights"]["quantized"]["tensors"] > 0


@pytest.mark.parametrize(("target", "weights", "dtype"), FORMS)
def test_each_weight_has_one_node_and_no_zero_points(target: str, weights: str, dtype: str) -> None:
    made = made_for(target, weights, dtype)
    release = find_release(str(made.bundle.manifest["engine"]["release"]))
    kinds = {"int4": onnx.TensorProto.INT4, "int8": onnx.TensorProto.INT8,
             "fp8": onnx.TensorProto.FLOAT8E4M3FN}  # fmt: skip
    for graph in ("prefill", "decode"):
        model = onnx.load(made.bundle.graph(graph), load_external_data=False)
        nodes = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
        held = {tensor.name: tensor for tensor in model.graph.initializer}
        assert nodes
        assert len({node.name for node in nodes}) == len(nodes)
        assert {len(node.input) for node in nodes} == {2}
        stored = {held[node.input[0]].data_type for node in nodes}
        assert stored == {kinds[kind] for kind in mixed_of(weights)}
        inside = [n.op_type for function in model.functions for n in function.node]
        assert "DequantizeLinear" not in inside
        found = lint_graph(made.bundle.graph(graph), release)
        assert [f.check for f in found if f.check != "profile-missing"] == []


def test_what_it_leaves_in_half_is_told() -> None:
    roles = made_for(*FORMS[0]).bundle.manifest["weights"]["quantized"]["roles"]
    assert set(roles) == {"linear", "kv_b", "head"}


def build_both(
    tmp_path: Path, checkpoint: Path, weights: str, mode: AuditMode = "fail"
) -> set[str]:
    """Both engines, by the product's own builder; the rules of its audit that are passed over."""
    bundle = mla_deploy.export(
        checkpoint, tmp_path / "bundle", target="rtx-40", weights=weights, capacity=256
    )
    made = mla_deploy.build(bundle.path, audit_mode=mode)
    for graph in made.report.graphs:
        assert graph.layers["DEQUANTIZE"] >= 7, (graph.graph, graph.layers)
    return {line.rule for line in made.audit if not line.passed}


@pytest.mark.slow
def test_an_engine_with_four_bits_is_built(tmp_path: Path) -> None:
    build_both(tmp_path, TRAINED, "int4")


# The builder keeps a widened copy of int8 weights in the plan, and widens fp8 ones in the prefill's
# activations: it builds, and the audit says so.
PASSED_OVER: dict[str, set[str]] = {
    "int4:block=128": set(),
    "int8": {"plan_bytes", "activation_bytes"},
    "fp8": {"activation_bytes"},
    "fp8:block=channel": {"activation_bytes"},
}


@pytest.mark.heavy
@pytest.mark.parametrize("weights", PASSED_OVER)
def test_a_layer_of_a_published_shape_is_built(tmp_path: Path, weights: str) -> None:
    checkpoint = write_shape(tmp_path / "checkpoint", "v2-lite")
    assert build_both(tmp_path, checkpoint, weights, "warn") == PASSED_OVER[weights]
