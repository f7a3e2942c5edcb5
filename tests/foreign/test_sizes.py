"""What is known of a value from the sizes of the inputs."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from mla_deploy.foreign.sequences import split_sequences
from mla_deploy.foreign.sizes import known_values


def _graph(nodes: list[onnx.NodeProto], opset: int, **inputs: list[object]) -> ir.Model:
    values = [helper.make_tensor_value_info(n, onnx.TensorProto.INT64, s) for n, s in
              inputs.items()]  # fmt: skip
    made = [helper.make_empty_tensor_value_info(nodes[-1].output[0])]
    graph = helper.make_graph(nodes, "sizes", values, made)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    return ir.from_proto(model)


@pytest.mark.parametrize("op_type", ["LessOrEqual", "GreaterOrEqual"])
@pytest.mark.parametrize("opset", [13, 15, 16, 20])
def test_comparisons_of_every_opset_have_a_shape(op_type: str, opset: int) -> None:
    """Before opset 16 their schemas are functions that tell no shape."""
    model = _graph([helper.make_node(op_type, ["a", "b"], ["c"])], opset, a=["n"], b=["m", 1])
    one, other = model.graph.inputs
    known = known_values(model, {one: (5,), other: (3, 1)})
    made = model.graph.outputs[0]
    assert known.shapes[made] == (3, 5) and known.dtypes[made] == ir.DataType.BOOL


def test_rows_of_a_table_along_two_axes() -> None:
    """More tokens than the table has rows: what is cut has as many rows as there are tokens."""
    table = helper.make_node("Constant", [], ["t"], value=onnx.numpy_helper.from_array(
        np.zeros((1, 8, 8, 2), np.int64)))  # fmt: skip
    nodes = [
        table,
        helper.make_node("Shape", ["a"], ["n"], start=0, end=1),
        helper.make_node("Constant", [], ["zero"], value_ints=[0, 0]),
        helper.make_node("Concat", ["n", "n"], ["ends"], axis=0),
        helper.make_node("Constant", [], ["axes"], value_ints=[1, 2]),
        helper.make_node("Slice", ["t", "zero", "ends", "axes"], ["c"]),
    ]
    model = _graph(nodes, 18, a=["n"])
    known = known_values(model, {model.graph.inputs[0]: (100,)})
    assert known.shapes[model.graph.outputs[0]] == (1, 100, 100, 2)


def test_a_sequence_that_is_handed_on_stays() -> None:
    sizes = helper.make_node("Constant", [], ["sizes"], value_ints=[3, 5])
    nodes = [
        sizes,
        helper.make_node("SplitToSequence", ["a", "sizes"], ["parts"], axis=0),
        helper.make_node("SequenceLength", ["parts"], ["c"]),
    ]
    model = _graph(nodes, 18, a=[8])
    split_sequences(model)
    assert [node.op_type for node in model.graph] == [node.op_type for node in nodes]
