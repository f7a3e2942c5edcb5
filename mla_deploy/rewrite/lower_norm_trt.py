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
        wide = op.Cast(x, to=ir.DataType.FLOAT)
        mean = op.ReduceMean(op.Mul(wide, wide), ints(op, [-1]), keepdims=1)
        root = op.Sqrt(op.Add(mean, op.Constant(value_float=epsilon)))
        return op.Mul(op.Div(wide, root), weight)


RMS_NORM = LowerRmsNorm.rule("lower_rms_norm")
