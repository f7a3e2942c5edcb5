"""lower: MoE -> one `If` for each expert, so that only the experts hit are read.

    # before:  MoE(hidden_XD, index_XK, weight_XK, gate_up_EID, down_EDI)
    # after:   for each expert e:  If(hit_e) { rows -> Gemm, Gemm, act * up, Gemm }
    #          Concat of the experts' rows, put back in order, weighted, summed over K

Time per token then follows K and not E, and each expert's weights stay the separate tensors they
are on disk. Measured on ONNX Runtime's CPU provider against the contrib MoE operator, gathered
weights and all experts: `bench/moe.py`.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mla_deploy.rewrite.rule import (
    DOMAIN,
    Mismatch,
    Rule,
    attribute,
    ints,
    required_node,
    static,
)

_FLOAT = ir.DataType.FLOAT


class LowerExperts(Rule):
    """Expert weights become free values `<stack>.{e}.<part>`; `weights.py` makes them inputs."""

    def pattern(
        self, op: Any, hidden: Any, index: Any, weight: Any, gate_up: Any, down: Any
    ) -> Any:
        return op.MoE(
            hidden,
            index,
            weight,
            gate_up,
            down,
            _domain=DOMAIN,
            _outputs=["out"],
            _allow_other_attributes=True,
        )

    def check(self, context: Any, gate_up: ir.Value, down: ir.Value, **_: Any) -> bool:
        if not (gate_up.is_graph_input() and down.is_graph_input()):
            raise Mismatch("the experts are not weights", gate_up)
        if static(gate_up, 0) != static(down, 0) or static(gate_up, 1) != 2 * static(down, 2):
            raise Mismatch("the experts are not gate, up and down of one width", down)
        return True

    def rewrite(
        self,
        op: Any,
        hidden: ir.Value,
        index: ir.Value,
        weight: ir.Value,
        gate_up: ir.Value,
        down: ir.Value,
        out: ir.Value,
        **_: Any,
    ) -> Any:
        experts, chosen, width = static(gate_up, 0), static(index, 1), static(hidden, 1)
        activation = str(attribute(required_node(out), "activation"))
        flat_Y = op.Reshape(index, ints(op, [-1]))
        true_Y = op.Expand(op.Cast(ints(op, [1]), to=ir.DataType.BOOL), op.Shape(flat_Y))
        none_E = op.Expand(op.Cast(ints(op, [0]), to=ir.DataType.BOOL), ints(op, [experts]))
        hit_E = op.ScatterElements(none_E, flat_Y, true_Y, axis=0)
        hits = op.Split(hit_E, axis=0, num_outputs=experts, _outputs=experts)
        hits = [hits] if experts == 1 else hits
        parts = []
        for e in range(experts):
            weights = _expert_weights(gate_up, down, e)
            taken = _taken(e, hidden, flat_Y, chosen=chosen, weights=weights, activation=activation)
            skipped = _skipped(e, width)
            rows, places = op.If(hits[e], then_branch=taken, else_branch=skipped, _outputs=2)
            parts.append((rows, places))
        # A row of `out_YD` is one (token, choice); `order_Y` says where each choice landed.
        out_YD = op.Concat(*(rows for rows, _ in parts), axis=0)
        landed_Y = op.Concat(*(places for _, places in parts), axis=0)
        count = op.Squeeze(op.Shape(flat_Y))
        zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
        order_Y = op.ScatterElements(landed_Y, landed_Y, op.Range(zero, count, one), axis=0)
        chosen_XKD = op.Reshape(op.Gather(out_YD, order_Y), ints(op, [-1, chosen, width]))
        weighted_XKD = op.Mul(chosen_XKD, op.Unsqueeze(weight, ints(op, [-1])))
        return op.ReduceSum(weighted_XKD, ints(op, [1]), keepdims=0)


def _expert_weights(gate_up: ir.Value, down: ir.Value, e: int) -> list[ir.Value]:
    """gate, up and down of expert `e`, named as checkpoints name them one by one."""
    prefix = str(gate_up.name).removesuffix(".gate_up_proj")
    inner, width = static(down, 2), static(down, 1)
    shapes = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    return [
        ir.Value(
            name=f"{prefix}.{e}.{part}.weight", shape=ir.Shape(shape), type=ir.TensorType(_FLOAT)
        )
        for part, shape in shapes.items()
    ]


def _taken(
    e: int,
    hidden: ir.Value,
    flat_Y: ir.Value,
    *,
    chosen: int,
    weights: list[ir.Value],
    activation: str,
) -> ir.Graph:
    gate, up, down = weights
    body = _Body(f"expert{e}")
    places = body.op(
        "Reshape",
        body.op("NonZero", body.op("Equal", flat_Y, body.constant(e))),
        body.constant([-1]),
    )
    tokens = body.op("Div", places, body.constant(chosen))
    x = body.op("Gather", hidden, tokens, axis=0)
    gated = _activated(body, body.op("Gemm", x, gate, transB=1), activation)
    inner = body.op("Mul", gated, body.op("Gemm", x, up, transB=1))
    rows = body.op("Gemm", inner, down, transB=1)
    return body.graph(rows, places)


def _activated(body: _Body, x: ir.Value, activation: str) -> ir.Value:
    if activation == "silu":
        return body.op("Mul", x, body.op("Sigmoid", x))
    return body.op({"gelu": "Gelu", "relu": "Relu"}[activation], x)


def _skipped(e: int, width: int) -> ir.Graph:
    body = _Body(f"skip{e}")
    rows = body.op("ConstantOfShape", body.constant([0, width]), value=ir.tensor([0.0], _FLOAT))
    places = body.op("ConstantOfShape", body.constant([0]), value=ir.tensor([0], ir.DataType.INT64))
    return body.graph(rows, places)


class _Body:
    """Builds one branch; names are the branch's own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[ir.Node] = []

    def op(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes or None)
        node.outputs[0].name = f"{self.name}_{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, value: int | list[int]) -> ir.Value:
        return self.op("Constant", value=ir.tensor(value, dtype=ir.DataType.INT64))

    def graph(self, *outputs: ir.Value) -> ir.Graph:
        return ir.Graph([], list(outputs), nodes=self.nodes, name=self.name)


RULE = LowerExperts.rule("lower_experts")
