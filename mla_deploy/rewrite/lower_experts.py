"""lower: MoE -> one `If` for each expert, so that only the experts hit are read.

    # before:  MoE(hidden_XD, index_XK, weight_XK, gate_up_EID, down_EDI)
    # after:   for each expert e:  If(hit_e) { rows -> Gemm, Gemm, act * up, Gemm }
    #          experts that return their input: their rows of hidden
    #          Concat of the experts' rows, put back in order, weighted, summed over K

Time per token then follows K and not E, and each expert's weights stay the separate tensors they
are on disk. Measured on ONNX Runtime's CPU provider against the contrib MoE operator, gathered
weights and all experts: `bench/moe.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from mla_deploy.rewrite.rule import (
    DOMAIN,
    Body,
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
        # Experts that return their input may have a gate all the same; nothing reads it.
        if static(gate_up, 0) < static(down, 0) or static(gate_up, 1) != 2 * static(down, 2):
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
        experts, chosen, width = static(down, 0), static(index, 1), static(hidden, 1)
        node = required_node(out)
        gate = Gate(str(attribute(node, "activation")), float(attribute(node, "limit")))
        identity = int(attribute(node, "identity"))
        flat_Y = op.Reshape(index, ints(op, [-1]))
        true_Y = op.Expand(op.Cast(ints(op, [1]), to=ir.DataType.BOOL), op.Shape(flat_Y))
        none_E = op.Expand(
            op.Cast(ints(op, [0]), to=ir.DataType.BOOL), ints(op, [experts + identity])
        )
        hit_E = op.ScatterElements(none_E, flat_Y, true_Y, axis=0)
        sizes = [1] * experts + ([identity] if identity else [])
        hits = op.Split(hit_E, ints(op, sizes), axis=0, _outputs=len(sizes))
        hits = [hits] if len(sizes) == 1 else hits
        parts = []
        for e in range(experts):
            weights = _expert_weights(gate_up, down, e)
            taken = _taken(e, hidden, flat_Y, chosen=chosen, weights=weights, gate=gate)
            parts.append(
                op.If(hits[e], then_branch=taken, else_branch=_skipped(e, width), _outputs=2)
            )
        if identity:
            places_Z = op.Reshape(
                op.NonZero(op.GreaterOrEqual(flat_Y, op.Constant(value_int=experts))),
                ints(op, [-1]),
            )
            tokens_Z = op.Div(places_Z, op.Constant(value_int=chosen))
            parts.append((op.Gather(hidden, tokens_Z, axis=0), places_Z))
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
    gate: Gate,
) -> ir.Graph:
    w_gate, w_up, w_down = weights
    body = Body(f"expert{e}")
    places = body.Reshape(
        body.NonZero(body.Equal(flat_Y, body.Constant(value_int=e))), ints(body, [-1])
    )
    tokens = body.Div(places, body.Constant(value_int=chosen))
    x = body.Gather(hidden, tokens, axis=0)
    inner = gate.inner(body, body.Gemm(x, w_gate, transB=1), body.Gemm(x, w_up, transB=1))
    return body.graph(body.Gemm(inner, w_down, transB=1), places)


@dataclass(frozen=True)
class Gate:
    """activation(gate) * up; with a limit both are cut, the gate from above only."""

    activation: str
    limit: float

    def inner(self, op: Any, gate: ir.Value, up: ir.Value) -> ir.Value:
        if self.limit > 0:
            most, least = (op.Constant(value_float=x) for x in (self.limit, -self.limit))
            gate, up = op.Min(gate, most), op.Clip(up, least, most)
        if self.activation == "silu":
            return op.Mul(op.Mul(gate, op.Sigmoid(gate)), up)
        return op.Mul(op.Gelu(gate) if self.activation == "gelu" else op.Relu(gate), up)


def _skipped(e: int, width: int) -> ir.Graph:
    body = Body(f"skip{e}")
    rows = body.ConstantOfShape(ints(body, [0, width]), value=ir.tensor([0.0], _FLOAT))
    places = body.ConstantOfShape(ints(body, [0]), value=ir.tensor([0], ir.DataType.INT64))
    return body.graph(rows, places)


RULE = LowerExperts.rule("lower_experts")
