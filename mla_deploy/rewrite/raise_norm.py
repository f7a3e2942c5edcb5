"""raise: the primitives of an RMS norm -> mla_deploy::RmsNorm.

    # before:  x --Pow(2)-->ReduceMean-->Add(eps)-->Sqrt-->Reciprocal--+
    #          x ------------------------------------------------------Mul-->Mul(weight)
    # after:   RmsNorm(x, weight; epsilon)          x / sqrt(mean(x^2) + eps) * weight

The mean is over the last axis only; epsilon is whatever the graph holds, never a default.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mla_deploy.rewrite.rule import DOMAIN, Mismatch, Rule, constant, scalar


class RaiseRmsNorm(Rule):
    def __init__(self, name: str, weight_first: bool) -> None:
        super().__init__(name)
        self.weight_first = weight_first

    def pattern(self, op: Any, x: Any, weight: Any, exponent: Any, axes: Any, epsilon: Any) -> Any:
        mean = op.ReduceMean(op.Pow(x, exponent), axes, keepdims=1, _allow_other_attributes=True)
        normed = op.Mul(x, op.Reciprocal(op.Sqrt(op.Add(mean, epsilon))))
        return op.Mul(weight, normed) if self.weight_first else op.Mul(normed, weight)

    def check(
        self,
        context: Any,
        x: ir.Value,
        weight: ir.Value,
        exponent: ir.Value,
        axes: ir.Value,
        epsilon: ir.Value,
        **_: Any,
    ) -> bool:
        if scalar(exponent) != 2.0:
            raise Mismatch("the exponent is not 2", exponent)
        last = [-1, len(x.shape) - 1] if x.shape is not None else [-1]
        over = constant(axes)
        if over is None or over.size != 1 or int(over.item()) not in last:
            raise Mismatch("the mean is not over the last axis", axes)
        if scalar(epsilon) is None:
            raise Mismatch("epsilon is not a constant", epsilon)
        if weight.shape is None or len(weight.shape) != 1:
            raise Mismatch("the weight is not a vector", weight)
        return True

    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value, epsilon: ir.Value, **_: Any) -> Any:
        return op.RmsNorm(x, weight, epsilon=scalar(epsilon), _domain=DOMAIN, _version=1)


RULES = (
    RaiseRmsNorm.rule("raise_rms_norm", weight_first=True),
    RaiseRmsNorm.rule("raise_rms_norm", weight_first=False),
)
