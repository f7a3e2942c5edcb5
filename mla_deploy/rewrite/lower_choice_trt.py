"""lower: the choice of tokens by a sparse layer, for TensorRT -> TopK, and a mask of the chosen.

    # before:  ChooseTokens(scores_BST; count) -> chosen_BSK
    # after:   TopK(scores, Min(count, T))

    # before:  SelectVisible(visible_B1ST, chosen_BSK)
    # after:   visible and ScatterElements(zeros_BSX, chosen, ones)[..., :T] > 0, X = T + 1

TensorRT scatters no truths and has no cheap branch, so marks are numbers. A choice of -1 is none:
it marks a slot of its own behind the last one, which is cut off.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mla_deploy.rewrite import lower_choice
from mla_deploy.rewrite.rule import ints

_INT64, _FLOAT = ir.DataType.INT64, ir.DataType.FLOAT


class SelectByMarks(lower_choice.LowerSelectVisible):
    def rewrite(self, op: Any, visible: ir.Value, chosen: ir.Value, **_: Any) -> Any:
        axis, zero_1 = ints(op, [2]), ints(op, [0])
        tokens_1 = op.Shape(visible, start=3)
        rows_BS = op.Shape(chosen, start=0, end=2)
        shape_BSX = op.Concat(rows_BS, op.Add(tokens_1, ints(op, [1])), axis=0)
        zero = op.Cast(op.Constant(value_float=0.0), to=_FLOAT)
        one = op.Cast(op.Constant(value_float=1.0), to=_FLOAT)
        index_BSK = op.Cast(chosen, to=_INT64)
        place_BSK = op.Where(op.Less(index_BSK, zero_1), tokens_1, index_BSK)
        ones_BSK = op.Expand(one, op.Shape(chosen))
        marks_BSX = op.ScatterElements(op.Expand(zero, shape_BSX), place_BSK, ones_BSK, axis=2)
        is_chosen_BST = op.Greater(op.Slice(marks_BSX, zero_1, tokens_1, axis), zero)
        return op.And(visible, op.Unsqueeze(is_chosen_BST, ints(op, [1])))


CHOOSE = lower_choice.CHOOSE
SELECT = SelectByMarks.rule("lower_select_visible")
