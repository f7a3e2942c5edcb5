"""lower: attention over an expanded latent, heads apart, the rope key never copied per head.

# before:  Attention(query, ExpandLatent(latent, rope key, w_kv_b))
# after:   scores = q_nope (w_uk latent^T) + q_rope rope_key^T
#          out = softmax(scores) (latent w_uv)
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mla_deploy.rewrite.absorb import (
    expanded_attention,
    expansion_sizes,
    split_heads,
    split_query,
)
from mla_deploy.rewrite.rule import (
    MASKED,
    Rule,
    attribute,
    ints,
    required_node,
    static,
    swapped,
)


class LowerExpanded(Rule):
    def __init__(self, name: str, sinks: bool) -> None:
        super().__init__(name)
        self.sinks = sinks

    def pattern(
        self, op: Any, query: Any, latent: Any, rope_key: Any, w_kv_b: Any, visible: Any, sinks: Any
    ) -> Any:
        extra = (sinks,) if self.sinks else ()
        return expanded_attention(op, query, (latent, rope_key, w_kv_b), visible, extra)

    def check(
        self, context: Any, latent: ir.Value, w_kv_b: ir.Value, key: ir.Value, **_: Any
    ) -> bool:
        expansion_sizes(key, latent, w_kv_b)
        return True

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
        key_BHNT = op.MatMul(w_uk_HNL, swapped(op, latent))
        scores_BHST = op.MatMul(op.Mul(q_nope_BHSN, scale), key_BHNT)
        if rope:
            turned_BHST = op.MatMul(op.Mul(q_rope_BHSR, scale), swapped(op, rope_key))
            scores_BHST = op.Add(scores_BHST, turned_BHST)
        probabilities_BHST = self._probabilities(op, scores_BHST, visible, sinks)
        return op.MatMul(probabilities_BHST, op.MatMul(latent, w_uv_HLV))

    def _probabilities(
        self, op: Any, scores_BHST: ir.Value, visible: ir.Value, sinks: ir.Value | None
    ) -> ir.Value:
        masked_BHST = op.Where(visible, scores_BHST, op.Constant(value_float=MASKED))
        out: ir.Value = _softmax(op, masked_BHST, sinks)
        return out


def _softmax(op: Any, scores_BHST: ir.Value, sinks_H: ir.Value | None) -> Any:
    if sinks_H is None:
        return op.Softmax(scores_BHST, axis=-1)
    shape_BHS1 = op.Concat(op.Shape(scores_BHST, start=0, end=3), ints(op, [1]), axis=0)
    sinks_BHS1 = op.Expand(op.Unsqueeze(sinks_H, ints(op, [0, 2, 3])), shape_BHS1)
    shares_BHSX = op.Softmax(op.Concat(scores_BHST, sinks_BHS1, axis=-1), axis=-1)
    return op.Slice(shares_BHSX, ints(op, [0]), ints(op, [-1]), ints(op, [3]))


RULES = tuple(LowerExpanded.rule("lower_expanded_attention", sinks) for sinks in (False, True))
