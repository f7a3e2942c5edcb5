"""Weights read as they are quantised on disk: values of eight bits, and a grid of scales.

    # Scales128x128To576(scale [5, 16]) -> [576, 16]     a model-local function, one per height
    # DequantizeLinear(weight [576, 2048] fp8, that; axis 1, block_size 128) -> [576, 2048] fp32

DequantizeLinear knows blocks along one axis, so the other is spread out first: four bytes for each
`columns` weights, folded when a session loads. The weight itself is not: ONNX Runtime leaves a
DequantizeLinear alone, so the weight stays mapped from its file. (The function takes no weight,
because ONNX Runtime 1.31 lets no float8 into a function that only hands it to another one.)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from mla_deploy.rewrite.rule import DOMAIN

_OPSET = 23


@dataclass(frozen=True)
class Blocks:
    """Rows and columns of a weight that share one scale; 0 stands for all of them."""

    rows: int
    columns: int

    def count(self, shape: tuple[int, ...]) -> int:
        """Scales that a matrix of `shape` has."""
        sides = zip((self.rows, self.columns), shape, strict=True)
        return prod(-(-size // block) if block else 1 for block, size in sides)


def dequantized(
    weight: ir.Value, scale: ir.Value, blocks: Blocks, function: ir.Function
) -> tuple[ir.Node, ir.Node]:
    """The nodes that give a weight in fp32; `function` is that of `scale_function`."""
    rows = ir.node(function.name, [scale], domain=DOMAIN)
    along = {"axis": 1, "block_size": blocks.columns} if blocks.columns else {"axis": 0}
    return rows, ir.node("DequantizeLinear", [weight, rows.outputs[0]], attributes=along)


def scale_function(blocks: Blocks, height: int) -> ir.Function:
    """A grid of scales, however its axes of one are written -> a row of it for each of `height`."""
    scale = ir.Value(name="scale")
    body = _Body()
    grid = body.op("Cast", scale, to=ir.DataType.FLOAT)
    if blocks.columns:
        shape = body.op("Concat", body.ints(-1), body.op("Shape", grid, start=-1), axis=0)
        flat = body.op("Unsqueeze", body.op("Reshape", grid, shape), body.ints(1))
    else:
        shape = body.ints(-1)
        flat = body.op("Reshape", grid, body.ints(-1, 1, 1))
    rows = body.op("Expand", flat, body.ints(1, blocks.rows or height, 1))
    rows = body.op("Reshape", rows, shape)
    if height % (blocks.rows or height):
        rows = body.op("Slice", rows, body.ints(0), body.ints(height), body.ints(0))
    name = f"Scales{blocks.rows or 'All'}x{blocks.columns or 'All'}To{height}"
    graph = ir.Graph([scale], [rows], nodes=body.nodes, opset_imports={"": _OPSET}, name=name)
    return ir.Function(DOMAIN, name, graph=graph, attributes=[])


class _Body:
    """Builds the nodes of a function."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def op(self, op_type: str, *inputs: ir.Value, **attributes: int | ir.DataType) -> ir.Value:
        return self._added(ir.node(op_type, inputs, attributes=attributes or None))

    def ints(self, *values: int) -> ir.Value:
        tensor = ir.tensor(values, ir.DataType.INT64)
        return self._added(ir.node("Constant", [], attributes={"value": tensor}))

    def _added(self, node: ir.Node) -> ir.Value:
        node.outputs[0].name = f"v{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]
