"""lower: RmsNorm -> primitives in fp32, for releases without RMSNormalization.

# before:  RmsNorm(x, weight; epsilon)
# after:   wide = Cast(x, fp32);  wide / Sqrt(ReduceMean(wide wide) + epsilon) * weight
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mla_deploy.rewrite import lower_linear
from mla_deploy.rewrite.rule import attribute, ints, required_node


class LowerRmsNorm(lower_linear.LowerRmsNorm):
    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value, out: ir.Value, **_: Any) -> Any:
        epsilon = float(attribute(required_node(out), "epsilon"))
        return in_primitives(op, x, weight, epsilon)


def in_primitives(op: Any, x: ir.Value, weight: ir.Value, epsilon: float) -> ir.Value:
    """The norm over the last axis, its sum of squares in fp32."""
    wide = op.Cast(x, to=ir.DataType.FLOAT)
    mean = op.ReduceMean(op.Mul(wide, wide), ints(op, [-1]), keepdims=1)
    root = op.Sqrt(op.Add(mean, op.Constant(value_float=epsilon)))
    made: ir.Value = op.Mul(op.Div(wide, root), weight)
    return made


RMS_NORM = LowerRmsNorm.rule("lower_rms_norm")
