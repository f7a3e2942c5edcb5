"""lower: the choice of tokens by a sparse layer -> TopK, and a mask of what was chosen.

    # before:  ChooseTokens(scores_BST; count) -> chosen_BSK
    # after:   TopK(scores, Min(count, T))

    # before:  SelectVisible(visible_B1ST, chosen_BSK)
    # after:   If(T <= K, all chosen) { visible }  else { visible and Scatter(no, chosen, yes) }

While no more tokens are cached than are chosen, every visible one is, and nothing is scattered. A
choice of -1 is none, and a scatter would take it for the last token.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mla_deploy.rewrite.rule import DOMAIN, Rule, attribute, branch, ints, required_node

_BOOL, _INT64 = ir.DataType.BOOL, ir.DataType.INT64


class LowerChooseTokens(Rule):
    def pattern(self, op: Any, scores: Any) -> Any:
        return op.ChooseTokens(
            scores, _domain=DOMAIN, _outputs=["chosen"], _allow_other_attributes=True
        )

    def rewrite(self, op: Any, scores: ir.Value, chosen: ir.Value, **_: Any) -> Any:
        count = ints(op, [int(attribute(required_node(chosen), "count"))])
        taken = op.Min(count, op.Shape(scores, start=2, end=3))
        _best, chosen_BSK = op.TopK(scores, taken, axis=-1, sorted=0, _outputs=2)
        return chosen_BSK


class LowerSelectVisible(Rule):
    def pattern(self, op: Any, visible: Any, chosen: Any) -> Any:
        return op.SelectVisible(visible, chosen, _domain=DOMAIN, _outputs=["selected"])

    def rewrite(self, op: Any, visible: ir.Value, chosen: ir.Value, **_: Any) -> Any:
        return selected(op, visible, chosen)


def selected(op: Any, visible: ir.Value, chosen: ir.Value) -> ir.Value:
    """visible_B1ST where the token is among chosen_BSK, for any number of new tokens."""
    every = branch("every", [("Identity", [visible])])
    none = ints(op, [0])
    some = branch(
        "some",
        [
            ("Squeeze", [visible, ints(op, [1])]),
            ("Shape", [0]),
            ("Expand", [op.Cast(none, to=_BOOL), 1]),
            ("Cast", [chosen], {"to": _INT64}),
            # In place of none another one of the same new token: both write the same.
            ("ReduceMax", [3, ints(op, [-1])]),
            ("GreaterOrEqual", [3, none]),
            ("Where", [5, 3, 4]),
            ("GreaterOrEqual", [6, none]),
            ("ScatterElements", [2, 6, 7], {"axis": 2}),
            ("Unsqueeze", [8, ints(op, [1])]),
            ("And", [visible, 9]),
        ],
    )
    out: ir.Value = op.If(every_is_chosen(op, visible, chosen), then_branch=every, else_branch=some)
    return out


def every_is_chosen(op: Any, visible: ir.Value, chosen: ir.Value) -> ir.Value:
    """Bool scalar: T <= K and no choice is none, so there are no more tokens than are chosen."""
    cached = op.Squeeze(op.Shape(visible, start=3))
    enough = op.LessOrEqual(cached, op.Squeeze(op.Shape(chosen, start=2)))
    least = op.ReduceMin(op.Cast(chosen, to=_INT64), keepdims=0)
    out: ir.Value = op.And(enough, op.GreaterOrEqual(least, op.Constant(value_int=0)))
    return out


CHOOSE = LowerChooseTokens.rule("lower_choose_tokens")
SELECT = LowerSelectVisible.rule("lower_select_visible")
