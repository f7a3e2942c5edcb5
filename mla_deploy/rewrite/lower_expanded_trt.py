"""lower: attention over an expanded latent, for TensorRT.

    # before:  Attention(query, ExpandLatent(latent, rope key, w_kv_b), visible)
    # after:   key = [w_uk latent | rope key], value = [w_uv latent | 0], both of width E
    #          Attention(query, key, value, visible)[..., :V]

A fused kernel wants one width for query, key and value, so the narrower ones are padded with zeros:
a zero in query and key adds nothing to a score, and a zero of the value is cut off. Releases
without the operator, and attention with sinks, which no fused kernel has, get the primitives with
an fp32 softmax.

One product gives the keys and values of all heads. Groups of heads one after the other, or values
from the whole row, were tried for less memory and took more: the builder joins the products of
groups (127 and 134 against 114 MB for 1024 new tokens over 4096, one layer of DeepSeek-V2-Lite).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from mla_deploy.rewrite.absorb import expansion_sizes, split_heads
from mla_deploy.rewrite.lower_absorbed_trt import masked_softmax
from mla_deploy.rewrite.lower_expanded import LowerExpanded
from mla_deploy.rewrite.rule import attribute, ints, required_node, static
from mla_deploy.rewrite.step_inputs import step_input

TRT = "trt"


class ExpandAndMultiply(LowerExpanded):
    """Primitives, with the softmax in fp32."""

    def _probabilities(
        self, op: Any, scores_BHST: ir.Value, visible: ir.Value, sinks: ir.Value | None
    ) -> ir.Value:
        return masked_softmax(op, scores_BHST, visible, sinks)


class ExpandAndFuse(LowerExpanded):
    """The fused operator: Attention of ONNX."""

    def rewrite(
        self,
        op: Any,
        query: ir.Value,
        latent: ir.Value,
        rope_key: ir.Value,
        w_kv_b: ir.Value,
        visible: ir.Value,
        key: ir.Value,
        out: ir.Value,
        **_: Any,
    ) -> Any:
        heads, nope, value, rank = expansion_sizes(key, latent, w_kv_b)
        rope = static(rope_key, -1)
        width = max(nope + rope, value)
        w_uk_HNL, w_uv_HLV = split_heads(op, w_kv_b, heads, nope, value)
        latent_BML = op.Squeeze(latent, ints(op, [1]))
        expand = Expansion(latent_BML, heads, rank)
        key_BHMN = expand.times(op, op.Transpose(w_uk_HNL, perm=[2, 0, 1]), nope)
        value_BHMV = expand.times(op, op.Transpose(w_uv_HLV, perm=[1, 0, 2]), value)
        operands = (
            padded(op, query, width - nope - rope),
            padded(op, _joined(op, key_BHMN, rope_key), width - nope - rope),
            padded(op, value_BHMV, width - value),
        )
        scale = float(attribute(required_node(out), "scale"))
        out_BHSE = self._attend(op, operands, attended(op, visible), scale)
        if width == value:
            return out_BHSE
        return op.Slice(out_BHSE, ints(op, [0]), ints(op, [value]), ints(op, [3]))

    def _attend(
        self, op: Any, operands: tuple[ir.Value, ...], visible: ir.Value, scale: float
    ) -> ir.Value:
        out: ir.Value = op.Attention(*operands, visible, scale=scale)
        return out


class ExpandAndFuseTrt(ExpandAndFuse):
    """TensorRT's own operator, which has no scale: the query takes it, and not the keys.

    The mask is given. The operator could make its own of lengths, but what its lower-right mask
    means beside them is written nowhere, and it takes as much memory.
    """

    def _attend(
        self, op: Any, operands: tuple[ir.Value, ...], visible: ir.Value, scale: float
    ) -> ir.Value:
        query, key, value = operands
        scaled = op.Mul(query, op.Constant(value_float=scale))
        out: ir.Value = op.TRT_Attention(scaled, key, value, visible, _domain=TRT)
        return out


@dataclass(frozen=True)
class Expansion:
    """Latents times a weight for each head, as one product: no head gets a copy of the latents."""

    latent_BML: ir.Value
    heads: int
    rank: int

    def times(self, op: Any, w_LHI: ir.Value, width: int) -> ir.Value:
        """[B, H, M, I]."""
        flat = op.Reshape(w_LHI, ints(op, [self.rank, self.heads * width]))
        out_BMHI = op.Reshape(op.MatMul(self.latent_BML, flat), ints(op, [0, 0, self.heads, width]))
        out: ir.Value = op.Transpose(out_BMHI, perm=[0, 2, 1, 3])
        return out


def attended(op: Any, visible_B1ST: ir.Value) -> ir.Value:
    """A mask that leaves no query without a slot: softmax over nothing is NaN in a fused kernel."""
    if visible_B1ST.is_graph_input() and visible_B1ST.name == "visible_B1ST":
        return step_input("attended_B1SM")
    # A ring's, or what a layer chose: where that is nothing, slot 0.
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    slots_T = op.Range(zero, op.Squeeze(op.Shape(visible_B1ST, start=3)), one)
    marks_B1ST = op.Cast(visible_B1ST, to=ir.DataType.FLOAT)
    none = op.Cast(op.Constant(value_float=0.5), to=ir.DataType.FLOAT)
    sees_nothing_B1S1 = op.Less(op.ReduceMax(marks_B1ST, ints(op, [-1])), none)
    out: ir.Value = op.Or(visible_B1ST, op.And(op.Less(slots_T, one), sees_nothing_B1S1))
    return out


def _joined(op: Any, key_BHMN: ir.Value, rope_key_B1MR: ir.Value) -> ir.Value:
    """[key | rope key], the rope key repeated for every head."""
    rope = static(rope_key_B1MR, -1)
    if not rope:
        return key_BHMN
    shape = op.Concat(op.Shape(key_BHMN, start=0, end=3), ints(op, [rope]), axis=0)
    out: ir.Value = op.Concat(key_BHMN, op.Expand(rope_key_B1MR, shape), axis=-1)
    return out


def padded(op: Any, value: ir.Value, zeros: int) -> ir.Value:
    """`value` with zeros behind its last axis."""
    if zeros == 0:
        return value
    out: ir.Value = op.Pad(value, ints(op, [0] * 7 + [zeros]))
    return out


_NAME = "lower_expanded_attention"
_SINKS = ExpandAndMultiply.rule(_NAME, True)
PRIMITIVE = (ExpandAndMultiply.rule(_NAME, False), _SINKS)
ONNX_FUSED = (ExpandAndFuse.rule(_NAME, False), _SINKS)
TRT_FUSED = (ExpandAndFuseTrt.rule(_NAME, False), _SINKS)
