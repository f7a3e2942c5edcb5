"""lower: linear layers and norms -> what ONNX Runtime runs from the bytes of the weight file.

    # before:  x --MatMul(Transpose(weight [out, in]))--> [+ bias]
    # after:   Reshape -> Gemm(x, weight, bias; transB=1) -> Reshape

A Transpose of a weight would be folded into a private copy when a session loads; Gemm reads the
checkpoint's own [out, in] layout, so the file stays mapped and is never copied.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mla_deploy.rewrite.rule import (
    DOMAIN,
    Mismatch,
    Rule,
    attribute,
    ints,
    rank,
    required_node,
    static,
)


class LowerLinear(Rule):
    def __init__(self, name: str, bias: bool) -> None:
        super().__init__(name)
        self.bias = bias

    def pattern(self, op: Any, x: Any, weight: Any, bias: Any) -> Any:
        product = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
        return op.Add(product, bias) if self.bias else product

    def check(
        self, context: Any, x: ir.Value, weight: ir.Value, bias: ir.Value | None = None, **_: Any
    ) -> bool:
        if not weight.is_graph_input():
            raise Mismatch("the matrix is not a weight", weight)
        if self.bias and (bias is None or not bias.is_graph_input() or rank(bias) != 1):
            raise Mismatch("the addend is not a bias vector", bias or x)
        rank(x)
        return True

    def rewrite(
        self, op: Any, x: ir.Value, weight: ir.Value, bias: ir.Value | None = None, **_: Any
    ) -> Any:
        operands = [weight] if bias is None else [weight, bias]
        if rank(x) == 2:
            return op.Gemm(x, *operands, transB=1)
        rows = op.Reshape(x, ints(op, [-1, static(weight, 1)]))
        out = op.Gemm(rows, *operands, transB=1)
        shape = op.Concat(
            op.Shape(x, start=0, end=rank(x) - 1), ints(op, [static(weight, 0)]), axis=0
        )
        return op.Reshape(out, shape)


class LowerRmsNorm(Rule):
    def pattern(self, op: Any, x: Any, weight: Any) -> Any:
        return op.RmsNorm(x, weight, _domain=DOMAIN, _outputs=["out"], _allow_other_attributes=True)

    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value, out: ir.Value, **_: Any) -> Any:
        epsilon = float(attribute(required_node(out), "epsilon"))
        return op.RMSNormalization(x, weight, axis=-1, epsilon=epsilon, stash_type=1)


LINEAR = (
    LowerLinear.rule("lower_linear", bias=True),
    LowerLinear.rule("lower_linear", bias=False),
)
RMS_NORM = LowerRmsNorm.rule("lower_rms_norm")
