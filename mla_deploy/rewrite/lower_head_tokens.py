"""lower: HeadTokens -> a gather of the new tokens that the head is computed on.

    # before:  HeadTokens(hidden_BSD, new_lengths_B) -> kept_BKD
    # after:   last_B1 = Max(new_lengths - 1, 0)
    #          last:      K = 1: GatherElements(hidden, last)
    #          verified:  K = S where S <= 8, else 1
    #                     GatherND(hidden, Where(S <= 8, Min([0 .. K), last), last))

The head is the widest product of a step. A prefill needs it of each row's last valid token only; a
decode graph checks up to 8 new tokens in one call. Padding repeats the row's last valid token, so
the last of the K kept is always that one, and a step of one token computes no more than before.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mla_deploy.rewrite.rule import DOMAIN, Rule, ints
from mla_deploy.shapes import MOST_VERIFIED


class LowerHeadTokens(Rule):
    def __init__(self, name: str, verified: bool) -> None:
        super().__init__(name)
        self.verified = verified

    def pattern(self, op: Any, hidden: Any, new_lengths: Any) -> Any:
        return op.HeadTokens(hidden, new_lengths, _domain=DOMAIN, _outputs=["kept"])

    def rewrite(self, op: Any, hidden: ir.Value, new_lengths: ir.Value, **_: Any) -> Any:
        one = op.Constant(value_int=1)
        last_B = op.Max(op.Sub(new_lengths, one), op.Constant(value_int=0))
        last_B1 = op.Unsqueeze(last_B, ints(op, [1]))
        if not self.verified:
            shape_B1D = op.Concat(op.Shape(last_B1), op.Shape(hidden, start=2), axis=0)
            index_B1D = op.Expand(op.Unsqueeze(last_B1, ints(op, [2])), shape_B1D)
            return op.GatherElements(hidden, index_B1D, axis=1)
        new_tokens = op.Squeeze(op.Shape(hidden, start=1, end=2))
        is_few = op.LessOrEqual(new_tokens, op.Constant(value_int=MOST_VERIFIED))
        steps_K = op.Range(op.Constant(value_int=0), op.Where(is_few, new_tokens, one), one)
        index_BK = op.Where(is_few, op.Min(steps_K, last_B1), last_B1)
        return op.GatherND(hidden, op.Unsqueeze(index_BK, ints(op, [2])), batch_dims=1)


LAST = LowerHeadTokens.rule("lower_head_tokens", verified=False)
VERIFIED = LowerHeadTokens.rule("lower_head_tokens", verified=True)
