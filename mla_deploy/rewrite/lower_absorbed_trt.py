"""lower: attention over the latent cache -> MatMul / Softmax / MatMul, for TensorRT.

    # before:  [q_latent | q_rope], rows_B1MW --LatentAttention--> out_BHSL
    # after:   scores = (rows query^T)^T [B, 1, H*S, M] --fp32 Softmax--> MatMul(rows) [..., :L]

Heads are folded into rows, so that one product serves all heads and the cache is never repeated for
each. The cache is the first operand of the scores: as the second the builder transposes it, which
is one more copy of it (84.8 against 49.1 MB for one row of 32768 tokens in fp16). The scale goes
into the query, the smallest operand. Scores are masked and their softmax taken in fp32; the
products take what the cache is stored in and accumulate in fp32.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mla_deploy.rewrite.lower_attention import LowerLatentAttention, row_source
from mla_deploy.rewrite.rule import MASKED, attribute, ints, required_node, static, swapped


class FoldHeads(LowerLatentAttention):
    def check(self, context: Any, latent: ir.Value, rope_key: ir.Value, **_: Any) -> bool:
        row_source(latent, rope_key)
        return True

    def rewrite(
        self,
        op: Any,
        q_latent: ir.Value,
        q_rope: ir.Value,
        latent: ir.Value,
        rope_key: ir.Value,
        visible: ir.Value,
        out: ir.Value,
        sinks: ir.Value | None = None,
        **_: Any,
    ) -> Any:
        node = required_node(out)
        heads, rank = int(attribute(node, "heads")), static(latent, -1)
        width = rank + static(rope_key, -1)
        query = q_latent if width == rank else op.Concat(q_latent, q_rope, axis=-1)
        scale = op.Constant(value_float=float(attribute(node, "scale")))
        query_B1XW = op.Reshape(op.Mul(query, scale), ints(op, [0, 1, -1, width]))
        rows_B1MW = row_source(latent, rope_key)
        scores_B1XM = swapped(op, op.MatMul(rows_B1MW, swapped(op, query_B1XW)))
        apart = op.Concat(ints(op, [0, heads]), op.Shape(visible, start=2), axis=0)
        weights_BHSM = masked_softmax(op, op.Reshape(scores_B1XM, apart), visible, sinks)
        weights_B1XM = op.Reshape(weights_BHSM, op.Shape(scores_B1XM))
        out_B1XW = op.MatMul(weights_B1XM, rows_B1MW)
        if width != rank:
            out_B1XW = op.Slice(out_B1XW, ints(op, [0]), ints(op, [rank]), ints(op, [3]))
        return op.Reshape(out_B1XW, ints(op, [0, heads, -1, rank]))


def masked_softmax(
    op: Any, scores_BHSM: ir.Value, visible_B1SM: ir.Value, sinks_H: ir.Value | None
) -> ir.Value:
    """Shares in fp32 of what is visible; a sink takes its own and gives nothing."""
    wide_BHSM = op.Cast(scores_BHSM, to=ir.DataType.FLOAT)
    masked_BHSM = op.Where(visible_B1SM, wide_BHSM, op.Constant(value_float=MASKED))
    if sinks_H is None:
        out: ir.Value = op.Softmax(masked_BHSM, axis=-1)
        return out
    shape_BHS1 = op.Concat(op.Shape(masked_BHSM, start=0, end=3), ints(op, [1]), axis=0)
    wide_H = op.Cast(sinks_H, to=ir.DataType.FLOAT)
    sinks_BHS1 = op.Expand(op.Unsqueeze(wide_H, ints(op, [0, 2, 3])), shape_BHS1)
    shares_BHSX = op.Softmax(op.Concat(masked_BHSM, sinks_BHS1, axis=-1), axis=-1)
    out = op.Slice(shares_BHSX, ints(op, [0]), ints(op, [-1]), ints(op, [3]))
    return out


RULES = tuple(FoldHeads.rule("lower_latent_attention", sinks) for sinks in (False, True))
