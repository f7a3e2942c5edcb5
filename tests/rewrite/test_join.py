"""Both graphs in one: what is alike stands once, and the values of either come out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from mla_deploy.rewrite import join
from mla_deploy.shapes import EXPANDED

W = 8
# `scaled` is what both graphs begin with; q, o and up are weights. Names of values differ.
_GRAPH = """<ir_version: 10, opset_import: ["" : 21, "mla_deploy" : 1]>
joined (float[S,8] x, float[T,8] cache) => (float[S,8] out)
<float[8,8] q = {{0}}, float[8,8] o = {{0}}, float[8,8] up = {{0}}> {{
    {n}scaled = MatMul (x, q)
    {n}attended = mla_deploy.Attend ({n}scaled, cache)
    {n}given = MatMul ({n}attended, o)
    {n}hidden = Add (x, {n}given)
    {n}wide = MatMul ({n}hidden, up)
    out = Tanh ({n}wide)
}}
<domain: "mla_deploy", opset_import: ["" : 21]>
Attend (scaled, cache) => (attended) {{
    turned = Transpose (cache)
    {body}
}}"""
_PREFILL = """scores = MatMul (scaled, turned)
    half = Constant <value_float = 0.5> ()
    halved = Mul (scores, half)
    shares = Softmax (halved)
    attended = MatMul (shares, cache)"""
_DECODE = """none = Constant <value_float = 0.0> ()
    scores = MatMul (scaled, turned)
    top = ReduceMax <keepdims = 0> (scores)
    is_low = Less (top, none)
    shares = If (is_low) <
        then_branch = low () => (float[a, b] flat) { flat = Relu (scores) },
        else_branch = high () => (float[a, b] flat) { flat = Sigmoid (scores) }
    >
    attended = MatMul (shares, cache)"""


def graph(body: str, prefix: str) -> Any:
    model = onnx.parser.parse_model(_GRAPH.format(body=body, n=prefix))
    rng = np.random.default_rng(3)
    del model.graph.initializer[:]
    for name in ("q", "o", "up"):
        values = rng.standard_normal((W, W)).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return model


@pytest.fixture
def prefill() -> Any:
    return graph(_PREFILL, "p_")


@pytest.fixture
def decode() -> Any:
    return graph(_DECODE, "d_")


def joined_model(prefill: Any, decode: Any) -> Any:
    return join.joined_model(prefill, decode)


def outputs(model: Any, **feeds: Any) -> list[Any]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def feeds(tokens: int) -> dict[str, Any]:
    rng = np.random.default_rng(tokens)
    x = rng.standard_normal((tokens, W)).astype(np.float32)
    return {"x": x, "cache": rng.standard_normal((5, W)).astype(np.float32)}


def branches(model: Any) -> Iterator[Any]:
    for node in model.graph.node:
        if node.op_type == "If" and node.input[0] == EXPANDED:
            yield from (attribute.g for attribute in node.attribute)


def test_what_is_alike_stands_once(prefill: Any, decode: Any) -> None:
    joined = joined_model(prefill, decode)
    found = Counter(node.op_type for node in joined.graph.node)
    # q, scores, o and up are multiplied outside of any branch, once each.
    assert found == {"Transpose": 1, "MatMul": 4, "If": 1, "Add": 1, "Tanh": 1}
    then, other = sorted(branches(joined), key=lambda graph: graph.name, reverse=True)
    assert [n.op_type for n in then.node] == ["Constant", "Mul", "Softmax", "MatMul"]
    assert [n.op_type for n in other.node] == ["Constant", "ReduceMax", "Less", "If", "MatMul"]
    assert [value.name for value in joined.graph.input] == ["x", "cache", EXPANDED]
    onnx.checker.check_model(joined, full_check=True)


@pytest.mark.parametrize("tokens", [1, 7])
def test_the_values_are_those_of_either(prefill: Any, decode: Any, tokens: int) -> None:
    joined = joined_model(prefill, decode)
    given = feeds(tokens)
    found = {side: outputs(joined, **given, **{EXPANDED: np.array(side)}) for side in (True, False)}
    np.testing.assert_allclose(found[True], outputs(prefill, **given), atol=1e-6)
    np.testing.assert_allclose(found[False], outputs(decode, **given), atol=1e-6)
    assert np.abs(found[True][0] - found[False][0]).max() > 0.01


def test_the_graphs_stay_as_they_were(prefill: Any, decode: Any) -> None:
    before = [model.SerializeToString(deterministic=True) for model in (prefill, decode)]
    again = [joined_model(prefill, decode).SerializeToString(deterministic=True) for _ in range(2)]
    assert before == [model.SerializeToString(deterministic=True) for model in (prefill, decode)]
    assert again[0] == again[1]


def test_a_constant_more_or_less_is_a_difference(prefill: Any) -> None:
    """The same operators with another number: not one product of both, but a branch."""
    other = graph(_PREFILL.replace("0.5", "0.25"), "d_")
    joined = joined_model(prefill, other)
    given = feeds(3)
    for side, model in ((True, prefill), (False, other)):
        found = outputs(joined, **given, **{EXPANDED: np.array(side)})
        np.testing.assert_allclose(found, outputs(model, **given), atol=1e-6)


def test_graphs_of_other_weights_stay_two(prefill: Any, decode: Any) -> None:
    weight = decode.graph.initializer[1]
    values = onnx.numpy_helper.to_array(weight) + 1
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    assert joined_model(prefill, decode) is None


def test_graphs_of_other_inputs_stay_two(prefill: Any, decode: Any) -> None:
    more = onnx.helper.make_tensor_value_info("more", onnx.TensorProto.FLOAT, [1])
    decode.graph.input.append(more)
    assert joined_model(prefill, decode) is None


def test_products_in_another_order_stay_two(prefill: Any, decode: Any) -> None:
    """`up` before `o` in one of them: an `If` before one would have to come after the other."""
    decode.graph.node[2].input[1], decode.graph.node[4].input[1] = "up", "o"
    assert joined_model(prefill, decode) is None


def test_a_cache_written_in_place_is_not_chosen(prefill: Any, decode: Any) -> None:
    """Through an `If` it would be copied."""
    for model, by in ((prefill, "Add"), (decode, "Sub")):
        row = onnx.helper.make_tensor("places", onnx.TensorProto.INT64, [1, 1], [2])
        nodes = (
            onnx.helper.make_node("Constant", [], ["places"], value=row),
            onnx.helper.make_node("Slice", ["x", "first", "last"], ["one"]),
            onnx.helper.make_node(by, ["one", "one"], ["row"]),
            onnx.helper.make_node("ScatterND", ["cache", "places", "row"], ["cache_out"]),
        )
        model.graph.node.extend(nodes)
        for name, value in (("first", 0), ("last", 1)):
            values = np.array([value], np.int64)
            model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
        out = onnx.helper.make_tensor_value_info("cache_out", onnx.TensorProto.FLOAT, ["T", W])
        model.graph.output.append(out)
    assert joined_model(prefill, decode) is None
    model.graph.node[-2].op_type = "Add"
    assert joined_model(prefill, decode) is not None
