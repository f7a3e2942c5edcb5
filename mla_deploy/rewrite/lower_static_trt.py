"""lower: a latent cache in int8 with scales that are the graph's own, for TensorRT.

    # before:  StaticUpdate(codes_B1ML, rows_B1SL, plan) -> codes_out, rows_B1ML
    # after:   QuantizeLinear(Where(active, rows[source], held), scale_L) -> ScatterND into codes
    #          DequantizeLinear(codes_out, scale_L) -> rows

    # before:  q_latent, q_rope, rows_B1ML, rope_key_B1MR --LatentAttention--> out_BHSL
    # after:   scores = q_latent rows^T + (rope_key q_rope^T)^T --fp32 Softmax--> MatMul(rows)

KVCacheUpdate takes no int8, so codes are scattered. An idle row writes what it holds, which is read
as numbers and rounded to the same codes again: ONNX Runtime's Where takes no int8. Stale slots need
no clearing: every code is a finite number, and they are masked. New rows are matrices where they
meet scales: of [B, 1, L] TensorRT-RTX 1.7 drops an axis, and then refuses that of the scales.

Latent and rope key are multiplied apart: joined in a row, the whole cache would be widened and
written once more. With the codes as the second operand of the scores the builder widens them inside
the products (`CastMulCastFc`); as the first, as a plain cache is, it writes them widened (attention
alone takes 25.5 against 42.3 MB over 8.4 MB of codes). The rope key stays the first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from mla_deploy.rewrite.lower_absorbed_trt import masked_softmax
from mla_deploy.rewrite.lower_attention import LowerLatentAttention
from mla_deploy.rewrite.rule import (
    DOMAIN,
    Mismatch,
    Rule,
    attribute,
    ints,
    producer,
    required_node,
    static,
)
from mla_deploy.rewrite.step_inputs import LATENT_SCALE, step_input

_FLOAT = ir.DataType.FLOAT


class StaticToScatter(Rule):
    def pattern(self, op: Any, codes: Any, rows: Any, active: Any, source: Any, slot: Any) -> Any:
        codes_out, rows_out = op.StaticUpdate(
            codes,
            rows,
            active,
            source,
            slot,
            _domain=DOMAIN,
            _outputs=["codes_out", "rows_out"],
        )
        return codes_out, rows_out

    def check(self, context: Any, codes: ir.Value, rows: ir.Value, **_: Any) -> bool:
        if static(codes, -1) != static(rows, -1):
            raise Mismatch("a row of codes is not as wide as the latent", codes)
        return True

    def rewrite(
        self,
        op: Any,
        codes: ir.Value,
        rows: ir.Value,
        active: ir.Value,
        source: ir.Value,
        slot: ir.Value,
        **_: Any,
    ) -> Any:
        scale_L, rank = step_input(LATENT_SCALE), static(rows, -1)
        zero_L = op.Constant(value=ir.tensor(np.zeros(rank, np.int8)))
        flat = ints(op, [-1, rank])
        new_BSL = op.GatherND(op.Squeeze(rows, ints(op, [1])), source, batch_dims=1)
        shape = op.Shape(new_BSL)
        held_XL = op.Reshape(op.GatherND(codes, slot), flat)
        held_BSL = op.Reshape(op.DequantizeLinear(held_XL, scale_L, axis=1), shape)
        written_XL = op.Reshape(op.Where(active, new_BSL, held_BSL), flat)
        codes_XL = op.QuantizeLinear(written_XL, scale_L, zero_L, axis=1)
        codes_out = op.ScatterND(codes, slot, op.Reshape(codes_XL, shape))
        return codes_out, op.DequantizeLinear(codes_out, scale_L, axis=-1)


class FoldHeadsApart(LowerLatentAttention):
    """As `lower_absorbed_trt`, over a latent of codes and a rope key beside it."""

    def check(self, context: Any, latent: ir.Value, **_: Any) -> bool:
        if producer(latent, "StaticUpdate", DOMAIN) is None:
            raise Mismatch("the latent is not of static codes", latent)
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
        scale = op.Constant(value_float=float(attribute(node, "scale")))
        # Of three axes, or the transpose is fused with the widening, and written so.
        latent_BML = op.Squeeze(latent, ints(op, [1]))
        query_BXL = op.Reshape(op.Mul(q_latent, scale), ints(op, [0, -1, rank]))
        scores_BXM = op.Cast(op.MatMul(query_BXL, _turned(op, latent_BML)), to=_FLOAT)
        rope = static(rope_key, -1)
        if rope:
            query_BXR = op.Reshape(op.Mul(q_rope, scale), ints(op, [0, -1, rope]))
            rope_key_BMR = op.Squeeze(rope_key, ints(op, [1]))
            of_rope_BXM = _turned(op, op.MatMul(rope_key_BMR, _turned(op, query_BXR)))
            scores_BXM = op.Add(scores_BXM, op.Cast(of_rope_BXM, to=_FLOAT))
        apart = op.Concat(ints(op, [0, heads]), op.Shape(visible, start=2), axis=0)
        weights_BHSM = masked_softmax(op, op.Reshape(scores_BXM, apart), visible, sinks)
        weights_BXM = op.Reshape(weights_BHSM, op.Shape(scores_BXM))
        out_BXL = op.MatMul(weights_BXM, latent_BML)
        return op.Reshape(out_BXL, ints(op, [0, heads, -1, rank]))


def _turned(op: Any, value_BXY: ir.Value) -> ir.Value:
    found: ir.Value = op.Transpose(value_BXY, perm=[0, 2, 1])
    return found


UPDATE = StaticToScatter.rule("lower_static_update")
ATTENTION = tuple(FoldHeadsApart.rule("lower_latent_attention", sinks) for sinks in (False, True))
