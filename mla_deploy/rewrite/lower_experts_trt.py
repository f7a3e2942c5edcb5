"""lower: MoE over stacked experts, for TensorRT, which has no operator for it on every part.

    # before:  MoE(hidden_XD, index_XK, weight_XK, gate_up_EID, down_EDI)
    # decode:  Gather(gate_up, index), Gather(down, index): the chosen experts of each token alone
    # prefill: every expert for every token, a few experts at a time; ScatterElements puts the
    #          weights of the chosen ones onto zeros, and the others count for nothing

With many tokens nearly every expert is hit, and gathering would copy weights for each token. A
block of experts holds [G, X, I] numbers at a time, so that memory follows G and not E.

In decode the gathered weights are copies, K experts of them. One choice after the other was tried
and took more (34.6 against 29.0 MB for 8 of 32 experts of 512 by 512): the builder runs the choices
side by side.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mla_deploy.rewrite.lower_experts import Gate, LowerExperts
from mla_deploy.rewrite.rule import attribute, ints, required_node, static

_BLOCKS = 16  # of experts in a prefill: fewer hold more at a time, more are more nodes


class ChosenExperts(LowerExperts):
    """Decode."""

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
        experts, width = static(down, 0), static(hidden, 1)
        identity = int(attribute(required_node(out), "identity"))
        chosen, share = index, weight
        if identity:
            is_real = op.Less(index, op.Constant(value_int=experts))
            chosen = op.Where(is_real, index, op.Constant(value_int=0))
            share = op.Where(is_real, weight, op.Constant(value_float=0.0))
        stack = stacked(gate_up, experts)
        hidden_X1D1 = op.Unsqueeze(hidden, ints(op, [1, 3]))
        both_XKI1 = op.MatMul(op.Gather(stack, chosen, axis=0), hidden_X1D1)
        gate_XKI1, up_XKI1 = op.Split(both_XKI1, axis=2, num_outputs=2, _outputs=2)
        inner_XKI1 = gate_of(out).inner(op, gate_XKI1, up_XKI1)
        made_XKD1 = op.MatMul(op.Gather(down, chosen, axis=0), inner_XKI1)
        made_XKD = op.Reshape(made_XKD1, ints(op, [0, static(index, 1), width]))
        total_XD = op.ReduceSum(
            op.Mul(made_XKD, op.Unsqueeze(share, ints(op, [2]))), ints(op, [1]), keepdims=0
        )
        if identity:
            total_XD = op.Add(total_XD, passed_on(op, hidden, (index, weight), experts))
        return total_XD


class EveryExpert(LowerExperts):
    """Prefill."""

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
        experts = static(down, 0)
        gate_up = stacked(gate_up, experts)
        identity = int(attribute(required_node(out), "identity"))
        rows_1 = op.Shape(index, start=0, end=1)
        shape_XE = op.Concat(rows_1, ints(op, [experts + identity]), axis=0)
        none_XE = op.Expand(op.Cast(op.Constant(value_float=0.0), to=ir.DataType.FLOAT), shape_XE)
        shares_XE = op.ScatterElements(none_XE, index, weight, axis=1)
        total_XD = None
        for first in range(0, experts, -(-experts // _BLOCKS)):
            last = min(experts, first + -(-experts // _BLOCKS))
            made_XD = self._block(op, hidden, (gate_up, down, shares_XE), (first, last), out)
            total_XD = made_XD if total_XD is None else op.Add(total_XD, made_XD)
        if identity:
            total_XD = op.Add(total_XD, passed_on(op, hidden, (index, weight), experts))
        return total_XD

    def _block(
        self,
        op: Any,
        hidden: ir.Value,
        operands: tuple[ir.Value, ir.Value, ir.Value],
        bounds: tuple[int, int],
        out: ir.Value,
    ) -> ir.Value:
        gate_up, down, shares_XE = operands
        first, last = (ints(op, [bound]) for bound in bounds)
        zero, one = ints(op, [0]), ints(op, [1])
        w_in_GID = op.Slice(gate_up, first, last, zero)
        w_out_GDI = op.Slice(down, first, last, zero)
        shares_GX1 = op.Unsqueeze(
            op.Transpose(op.Slice(shares_XE, first, last, one), perm=[1, 0]), ints(op, [2])
        )
        both_GXI = op.MatMul(op.Unsqueeze(hidden, zero), op.Transpose(w_in_GID, perm=[0, 2, 1]))
        gate_GXI, up_GXI = op.Split(both_GXI, axis=2, num_outputs=2, _outputs=2)
        inner_GXI = gate_of(out).inner(op, gate_GXI, up_GXI)
        made_GXD = op.MatMul(inner_GXI, op.Transpose(w_out_GDI, perm=[0, 2, 1]))
        total: ir.Value = op.ReduceSum(op.Mul(made_GXD, shares_GX1), zero, keepdims=0)
        return total


def gate_of(out: ir.Value) -> Gate:
    node = required_node(out)
    return Gate(str(attribute(node, "activation")), float(attribute(node, "limit")))


def stacked(gate_up: ir.Value, experts: int) -> ir.Value:
    """The stack of the experts that have weights; a class may keep rows that nothing reads, and
    no checkpoint has: the layer's input is the shorter for it."""
    gate_up.shape = ir.Shape((experts, static(gate_up, 1), static(gate_up, 2)))
    return gate_up


def passed_on(
    op: Any, hidden: ir.Value, chosen: tuple[ir.Value, ir.Value], experts: int
) -> ir.Value:
    """What the experts that return their input give: hidden times the sum of their weights."""
    index, weight = chosen
    is_none = op.GreaterOrEqual(index, op.Constant(value_int=experts))
    share_XK = op.Where(is_none, weight, op.Constant(value_float=0.0))
    total: ir.Value = op.Mul(hidden, op.ReduceSum(share_XK, ints(op, [1]), keepdims=1))
    return total


CHOSEN = ChosenExperts.rule("lower_experts")
EVERY = EveryExpert.rule("lower_experts")
