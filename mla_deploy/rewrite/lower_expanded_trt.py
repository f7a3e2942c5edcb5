"""lower: attention over an expanded latent, for TensorRT.

    # before:  Attention(query, ExpandLatent(latent, rope key, w_kv_b), visible)
    # after:   key = [w_uk latent | rope key], value = [w_uv latent | 0], both of width E
    #          Attention(query, key, value, visible)[..., :V]

A fused kernel wants one width for query, key and value, so the narrower ones are padded with zeros:
a zero in query and key adds nothing to a score, and a zero of the value is cut off. The value's
zeros come from the weight, so that nothing per token is padded. Releases without the operator, and
attention with sinks, which no fused kernel has, get the primitives with an fp32 softmax.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mla_deploy.rewrite.absorb import expansion_sizes, split_heads, split_query
from mla_deploy.rewrite.lower_absorbed_trt import masked_softmax
from mla_deploy.rewrite.lower_expanded import LowerExpanded
from mla_deploy.rewrite.rule import attribute, ints, required_node, static, swapped
from mla_deploy.rewrite.step_inputs import step_input

TRT = "trt"


class ExpandAndMultiply(LowerExpanded):
    """Primitives."""

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
        sinks: ir.Value | None = None,
        **_: Any,
    ) -> Any:
        heads, nope, value, _rank = expansion_sizes(key, latent, w_kv_b)
        w_uk_HNL, w_uv_HLV = split_heads(op, w_kv_b, heads, nope, value)
        rope = static(rope_key, -1)
        q_nope_BHSN, q_rope_BHSR = split_query(op, query, nope, rope)
        scale = op.Constant(value_float=float(attribute(required_node(out), "scale")))
        key_BHNM = op.MatMul(w_uk_HNL, swapped(op, latent))
        scores_BHSM = op.MatMul(op.Mul(q_nope_BHSN, scale), key_BHNM)
        if rope:
            turned_BHSM = op.MatMul(op.Mul(q_rope_BHSR, scale), swapped(op, rope_key))
            scores_BHSM = op.Add(scores_BHSM, turned_BHSM)
        weights_BHSM = masked_softmax(op, scores_BHSM, visible, sinks)
        return op.MatMul(weights_BHSM, op.MatMul(latent, w_uv_HLV))


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
        heads, nope, value, _rank = expansion_sizes(key, latent, w_kv_b)
        rope = static(rope_key, -1)
        width = max(nope + rope, value)
        w_uk_HNL, w_uv_HLV = split_heads(op, w_kv_b, heads, nope, value)
        query_BHSE = padded(op, query, width - nope - rope)
        key_BHMN = op.MatMul(latent, op.Transpose(w_uk_HNL, perm=[0, 2, 1]))
        key_BHME = _joined(op, key_BHMN, rope_key, width - nope - rope)
        value_BHME = op.MatMul(latent, padded(op, w_uv_HLV, width - value, rank=3))
        scale = float(attribute(required_node(out), "scale"))
        if visible.is_graph_input():  # the plan's own mask; a layer's own never is empty
            visible = step_input("attended_B1SM")
        out_BHSE = self._attend(op, (query_BHSE, key_BHME, value_BHME), visible, scale)
        if width == value:
            return out_BHSE
        return op.Slice(out_BHSE, ints(op, [0]), ints(op, [value]), ints(op, [3]))

    def _attend(
        self, op: Any, operands: tuple[ir.Value, ...], visible: ir.Value, scale: float
    ) -> ir.Value:
        out: ir.Value = op.Attention(*operands, visible, scale=scale)
        return out


class ExpandAndFuseTrt(ExpandAndFuse):
    """TensorRT's own operator, which has no scale: the query takes it, and not the keys."""

    def _attend(
        self, op: Any, operands: tuple[ir.Value, ...], visible: ir.Value, scale: float
    ) -> ir.Value:
        query, key, value = operands
        scaled = op.Mul(query, op.Constant(value_float=scale))
        out: ir.Value = op.TRT_Attention(scaled, key, value, visible, _domain=TRT)
        return out


def _joined(op: Any, key_BHMN: ir.Value, rope_key_B1MR: ir.Value, zeros: int) -> ir.Value:
    """[key | rope key | zeros], the rope key repeated for every head."""
    rope = static(rope_key_B1MR, -1)
    if not rope:
        return padded(op, key_BHMN, zeros)
    shape = op.Concat(op.Shape(key_BHMN, start=0, end=3), ints(op, [rope]), axis=0)
    joined: ir.Value = op.Concat(key_BHMN, op.Expand(rope_key_B1MR, shape), axis=-1)
    return padded(op, joined, zeros)


def padded(op: Any, value: ir.Value, zeros: int, rank: int = 4) -> ir.Value:
    """`value` with zeros behind its last axis."""
    if zeros == 0:
        return value
    out: ir.Value = op.Pad(value, ints(op, [0] * (2 * rank - 1) + [zeros]))
    return out


_NAME = "lower_expanded_attention"
_SINKS = ExpandAndMultiply.rule(_NAME, True)
PRIMITIVE = (ExpandAndMultiply.rule(_NAME, False), _SINKS)
ONNX_FUSED = (ExpandAndFuse.rule(_NAME, False), _SINKS)
TRT_FUSED = (ExpandAndFuseTrt.rule(_NAME, False), _SINKS)
