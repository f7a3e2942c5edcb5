"""lower: operators of opset 23 that another exporter wrote -> primitives, for releases of opset 20.

# before:  RMSNormalization(x, weight; epsilon)
# after:   as RmsNorm, in fp32

# before:  RotaryEmbedding(x, cos, sin [, positions]; interleaved, rotary_embedding_dim)
# after:   first, second = halves of x, or its even and odd places
#          [first cos - second sin | first sin + second cos], the rest of x behind
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mla_deploy.rewrite.lower_norm_trt import in_primitives
from mla_deploy.rewrite.rule import Mismatch, Rule, ints, rank, required_node

_EPSILON = 1e-5  # the operator's own default
_FOUR = 4


class LowerRmsNormalization(Rule):
    def pattern(self, op: Any, x: Any, weight: Any) -> Any:
        return op.RMSNormalization(x, weight, _allow_other_attributes=True, _outputs=["out"])

    def check(self, context: Any, x: ir.Value, weight: ir.Value, out: ir.Value, **_: Any) -> bool:
        axis = required_node(out).attributes.get_int("axis", -1)
        if axis != -1 and axis != rank(x) - 1:
            raise Mismatch("the norm is not over the last axis", out)
        return True

    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value, out: ir.Value, **_: Any) -> Any:
        attributes = required_node(out).attributes
        return in_primitives(op, x, weight, attributes.get_float("epsilon", _EPSILON))


class LowerRotaryEmbedding(Rule):
    """x is [B, H, S, E], or [B, S, H*E] with the number of heads as an attribute."""

    def __init__(self, name: str, looked_up: bool) -> None:
        super().__init__(name)
        self.looked_up = looked_up

    def pattern(self, op: Any, x: Any, cos: Any, sin: Any, positions: Any) -> Any:
        given = (x, cos, sin, positions) if self.looked_up else (x, cos, sin)
        return op.RotaryEmbedding(*given, _allow_other_attributes=True, _outputs=["out"])

    def check(self, context: Any, x: ir.Value, out: ir.Value, **_: Any) -> bool:
        if rank(x) != _FOUR and required_node(out).attributes.get_int("num_heads", 0) < 1:
            raise Mismatch("the number of heads is not told", out)
        return True

    def rewrite(
        self,
        op: Any,
        x: ir.Value,
        cos: ir.Value,
        sin: ir.Value,
        out: ir.Value,
        positions: ir.Value | None = None,
        **_: Any,
    ) -> Any:
        attributes = required_node(out).attributes
        heads = attributes.get_int("num_heads", 0)
        turned = attributes.get_int("rotary_embedding_dim", 0)
        is_apart = rank(x) == _FOUR
        apart = x if is_apart else op.Reshape(x, ints(op, [0, 0, heads, -1]))
        if self.looked_up:
            cos, sin = (op.Gather(table, positions, axis=0) for table in (cos, sin))
        axis = ints(op, [1 if is_apart else 2])  # that of heads
        tables = (op.Unsqueeze(cos, axis), op.Unsqueeze(sin, axis))
        part = _places(op, apart, 0, turned) if turned else apart
        turn = _interleaved if attributes.get_int("interleaved", 0) else _halves
        made = turn(op, part, tables)
        if turned:
            made = op.Concat(made, _places(op, apart, turned, 2**31 - 1), axis=-1)
        return made if is_apart else op.Reshape(made, op.Shape(x))


def _halves(op: Any, x: ir.Value, tables: tuple[ir.Value, ir.Value]) -> ir.Value:
    first, second = op.Split(x, num_outputs=2, axis=-1, _outputs=2)
    made: ir.Value = op.Concat(*_turned(op, first, second, tables), axis=-1)
    return made


def _interleaved(op: Any, x: ir.Value, tables: tuple[ir.Value, ir.Value]) -> ir.Value:
    pairs = op.Reshape(x, ints(op, [0, 0, 0, -1, 2]))
    first, second = (op.Squeeze(_places(op, pairs, at, at + 1), ints(op, [4])) for at in (0, 1))
    parts = (op.Unsqueeze(part, ints(op, [4])) for part in _turned(op, first, second, tables))
    made: ir.Value = op.Reshape(op.Concat(*parts, axis=-1), ints(op, [0, 0, 0, -1]))
    return made


def _turned(
    op: Any, first: ir.Value, second: ir.Value, tables: tuple[ir.Value, ir.Value]
) -> tuple[ir.Value, ir.Value]:
    cos, sin = tables
    return (
        op.Sub(op.Mul(first, cos), op.Mul(second, sin)),
        op.Add(op.Mul(first, sin), op.Mul(second, cos)),
    )


def _places(op: Any, x: ir.Value, start: int, stop: int) -> ir.Value:
    found: ir.Value = op.Slice(x, ints(op, [start]), ints(op, [stop]), ints(op, [-1]))
    return found


RULES = (
    LowerRmsNormalization.rule("lower_rms_normalization"),
    LowerRotaryEmbedding.rule("lower_rotary_embedding", False),
    LowerRotaryEmbedding.rule("lower_rotary_embedding", True),
)
