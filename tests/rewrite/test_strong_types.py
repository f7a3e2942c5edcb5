"""Strong types: which dtype each node gets, where casts stand; tables of releases that say no."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest

from mla_deploy.errors import MlaDeployError
from mla_deploy.rewrite.release import require_operators
from mla_deploy.rewrite.releases import RELEASES, find_release
from mla_deploy.rewrite.strong_types import assign_types
from tests.rewrite.graphs import parsed

FLOAT, HALF, BOOL = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BOOL

TEXT = """
layer (float[B, 4] x, float[4, 4] w, float[8, 4] router, float[4] bias, float[B, 4] angle)
    => (float[B, 4] out, float[B, 8] scores) {
    product = MatMul (x, w)
    sum = Add (product, bias)
    one = Constant <value_float: float = 1.0> ()
    more = Add (sum, one)
    turned = Mul (more, angle)
    joined = Concat <axis: int = 0> (more, turned)
    axis = Constant <value_ints: ints = [1]> ()
    squares = ReduceSumSquare <keepdims: int = 1> (more, axis)
    across = Transpose <perm: ints = [1, 0]> (router)
    scores = MatMul (more, across)
    truth = Greater (squares, one)
    out = Where (truth, turned, more)
}
"""


def typed(half: ir.DataType = HALF) -> dict[str, ir.Value]:
    """Values of TEXT by name; x and w are half, the router, bias and angle fp32."""
    model = parsed(TEXT)
    graph = model.graph
    x, w, router, bias, _ = graph.inputs
    for value in (x, w):
        value.type = ir.TensorType(half)
    out, scores = graph.outputs
    assign_types(graph, half, [w, router, bias], {out: half, scores: FLOAT})
    made = {str(v.name): v for node in graph for v in node.outputs}
    return {**made, "out": graph.outputs[0], "scores": graph.outputs[1]}


def test_each_node_has_its_dtype() -> None:
    values = typed()
    wanted = {
        "product": HALF,  # its weight's
        "sum": HALF,  # a bias follows
        "more": HALF,  # a constant follows
        "turned": FLOAT,  # the angle is fp32
        "joined": HALF,  # feeds a product or the cache
        "squares": FLOAT,  # adds up
        "scores": FLOAT,  # the router's weight is fp32
        "truth": BOOL,
        "out": HALF,  # asked for
    }
    assert {name: values[name].dtype for name in wanted} == wanted


def test_operands_of_a_node_agree() -> None:
    node = typed()["out"].producer()
    while node is not None and node.op_type != "Where":
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    assert node is not None
    for value in (node, *(v.producer() for v in node.inputs if v is not None)):
        floats = {v.dtype for v in getattr(value, "inputs", ()) if v.dtype in (FLOAT, HALF)}
        assert len(floats) <= 1 or getattr(value, "op_type", "") == "Cast"


def test_fp32_needs_no_cast() -> None:
    producer: Any = typed(FLOAT)["out"].producer()
    assert "Cast" not in {node.op_type for node in producer.graph}


def test_a_value_of_no_known_dtype_is_refused() -> None:
    model = parsed(TEXT)
    model.graph.inputs[0].type = None
    with pytest.raises(MlaDeployError) as caught:
        assign_types(model.graph, HALF, [], {})
    assert caught.value.code in ("REW-TYPE",)


def test_an_operator_outside_the_table_is_named() -> None:
    model = parsed("g (float[4] x) => (float[4] y) { a = Erf (x) y = Celu (a) }")
    for release in RELEASES.values():
        with pytest.raises(MlaDeployError) as caught:
            require_operators(release, model)
        assert caught.value.code == "REW-OPERATOR" and "holds Celu, not" in caught.value.message


def test_releases_are_found_by_name() -> None:
    assert find_release("10.16").opset == 24 and find_release("10.3").opset == 20
    assert not find_release("10.13").has_tensor_scatter
    with pytest.raises(MlaDeployError) as caught:
        find_release("9.0")
    assert caught.value.code == "REW-RELEASE"
