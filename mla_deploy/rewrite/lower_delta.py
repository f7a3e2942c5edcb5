"""lower: DeltaAttention -> the contrib operator that walks the tokens with a head's state in cache.

    # before:  DeltaAttention(query_BSHK, key_BSHK, value_BSHV, decay_BSHK, beta_BSH, state, valid)
    # after:   query, key --RMSNormalization--+
    #          key, value, decay, beta --Where(idle, 0)--Reshape--LinearAttention(state)
    #          out <--Reshape--Where(idle, 0)-----------------------+   +--> state_out

A token without key and value, of beta 0 and decay 0, writes exp(0) state + 0: an idle token leaves
the state as it was, whatever its own numbers are. RMSNormalization is the l2 norm when its weight
is 1 / sqrt(K) and its epsilon is divided by K. The operator multiplies by decays, token by token,
and never divides by one, so none is too strong for it. It copies the state to state_out before
anything else, so both may be bound to one buffer.

The operator is in ONNX Runtime from 1.25.1; elsewhere the composite's plain body runs, a Scan over
tokens. Measured against that and against a chunked form: `bench/delta.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from mla_deploy.rewrite.rule import (
    DOMAIN,
    Mismatch,
    Rule,
    attribute,
    ints,
    rank,
    required_dtype,
    required_node,
    static,
)

_CONTRIB = "com.microsoft"
_EPSILON = 1e-6  # of the l2 norm, beside the sum of squares


class LowerDeltaAttention(Rule):
    def pattern(
        self,
        op: Any,
        query: Any,
        key: Any,
        value: Any,
        decay: Any,
        beta: Any,
        state: Any,
        valid: Any,
    ) -> Any:
        out, state_out = op.DeltaAttention(
            query,
            key,
            value,
            decay,
            beta,
            state,
            valid,
            _domain=DOMAIN,
            _outputs=["out", "state_out"],
            _allow_other_attributes=True,
        )
        return out, state_out

    def check(
        self,
        context: Any,
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        decay: ir.Value,
        beta: ir.Value,
        state: ir.Value,
        out: ir.Value,
        **_: Any,
    ) -> bool:
        heads, width, wide = static(query, 2), static(query, 3), static(value, 3)
        for operand, first, sizes in (
            (query, 2, (heads, width)),
            (key, 2, (heads, width)),
            (value, 2, (heads, wide)),
            (decay, 2, (heads, width)),
            (beta, 2, (heads,)),
            (state, 1, (heads, width, wide)),
        ):
            if required_dtype(operand) != ir.DataType.FLOAT:
                raise Mismatch("linear attention is kept and computed in fp32", operand)
            if rank(operand) != first + len(sizes) or sizes != tuple(
                static(operand, first + axis) for axis in range(len(sizes))
            ):
                raise Mismatch(f"not of {heads} heads, key {width} by value {wide}", operand)
        if attribute(required_node(out), "normalize") not in (0, 1):
            raise Mismatch("normalize is neither 0 nor 1", out)
        return True

    def rewrite(
        self,
        op: Any,
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        decay: ir.Value,
        beta: ir.Value,
        state: ir.Value,
        valid: ir.Value,
        out: ir.Value,
        **_: Any,
    ) -> Any:
        heads, width, wide = static(query, 2), static(query, 3), static(value, 3)
        if attribute(required_node(out), "normalize"):
            query, key = _normalized(op, query, width), _normalized(op, key, width)
        zero = op.Constant(value_float=0.0)
        idle_BS = op.Not(valid)
        idle_BS1 = op.Unsqueeze(idle_BS, ints(op, [2]))
        idle_BS11 = op.Unsqueeze(idle_BS, ints(op, [2, 3]))
        packed_K, packed_V = ints(op, [0, 0, heads * width]), ints(op, [0, 0, heads * wide])
        made_BSY, state_out = op.LinearAttention(
            op.Reshape(query, packed_K),
            op.Reshape(op.Where(idle_BS11, zero, key), packed_K),
            op.Reshape(op.Where(idle_BS11, zero, value), packed_V),
            state,
            op.Reshape(op.Where(idle_BS11, zero, decay), packed_K),
            op.Where(idle_BS1, zero, beta),
            q_num_heads=heads,
            kv_num_heads=heads,
            update_rule="gated_delta",
            scale=width**-0.5,
            _domain=_CONTRIB,
            _outputs=2,
        )
        # Written so that whoever infers shapes without knowing the operator keeps those of `out`:
        # the type comes from the zero, the shape from the values.
        return op.Reshape(op.Where(idle_BS1, zero, made_BSY), op.Shape(value)), state_out


def _normalized(op: Any, x: ir.Value, width: int) -> ir.Value:
    weight_K = op.Constant(value=ir.tensor(np.full(width, width**-0.5, np.float32)))
    return op.RMSNormalization(x, weight_K, axis=-1, epsilon=_EPSILON / width, stash_type=1)


RULE = LowerDeltaAttention.rule("lower_delta_attention")
