"""A builder of small ONNX graphs, of standard operators and of the product's composites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

OPSET = 23
_IR_TYPES = {"float32": ir.DataType.FLOAT, "int64": ir.DataType.INT64, "bool": ir.DataType.BOOL}


class GraphBuilder:
    """Nodes on a tape; inputs are declared where they are needed."""

    def __init__(self) -> None:
        self.tape = ir.tape.Tape()
        self.inputs: list[ir.Value] = []

    def input(self, name: str, dtype: str, *shape: int | str) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(_IR_TYPES[dtype]))
        self.inputs.append(value)
        return value

    def op(self, name: str, *inputs: ir.Value | None, domain: str = "", **given: Any) -> ir.Value:
        return self.tape.op(name, inputs, given, domain=domain)

    def ops(
        self, name: str, count: int, *inputs: ir.Value | None, domain: str = "", **given: Any
    ) -> Sequence[ir.Value]:
        return self.tape.op_multi_out(name, inputs, given, domain=domain, num_outputs=count)

    def ints(self, *values: int) -> ir.Value:
        return self.op("Constant", value_ints=list(values))

    def model(self, **outputs: ir.Value) -> ir.Model:
        for name, value in outputs.items():
            value.name = name
            # ONNX Runtime infers the shape; a graph output must have a type.
            value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
        domains = {node.domain for node in self.tape.nodes} - {""}
        graph = ir.Graph(
            self.inputs, list(outputs.values()), nodes=self.tape.nodes, name="bench",
            opset_imports={"": OPSET, **dict.fromkeys(domains, 1)},
        )  # fmt: skip
        return ir.Model(graph, ir_version=11)


def shaped(value: ir.Value, *shape: int | str) -> ir.Value:
    """Say what a rule will ask: the shape and type of a composite's output."""
    value.shape, value.type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
    return value


def tidied(model: ir.Model) -> ir.Model:
    RemoveUnusedNodesPass()(model)
    return model
