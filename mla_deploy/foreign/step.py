"""The step plan as nodes: what the two length inputs imply. `source/plan.py` says what each is."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from mla_deploy import shapes
from mla_deploy.foreign.nodes import Nodes, typed

_INT, _BOOL = ir.DataType.INT64, ir.DataType.BOOL


@dataclass(frozen=True)
class StepNodes:
    """The plan of a call, and its sizes as vectors of one integer."""

    ids: ir.Value
    new_lengths_B: ir.Value
    batch_1: ir.Value
    new_1: ir.Value
    positions_BS: ir.Value
    visible_B1ST: ir.Value
    filled_B1T1: ir.Value
    all_visible: ir.Value
    active_B11: ir.Value
    valid_BS1: ir.Value
    source_BS1: ir.Value
    slot_BS3: ir.Value

    @property
    def update(self) -> tuple[ir.Value, ...]:
        """What CacheUpdate takes behind the cache and the rows."""
        return (self.filled_B1T1, self.all_visible, self.active_B11, self.source_BS1,
                self.slot_BS3)  # fmt: skip


def step_nodes(
    nodes: Nodes, inputs: tuple[ir.Value, ...], cache: ir.Value, growing: bool
) -> StepNodes:
    """`inputs` are ids, cache lengths and new lengths; `cache` tells how many rows are bound."""
    ids, cache_lengths_B, new_lengths_B = inputs
    zero, one = nodes.whole(0), nodes.whole(1)
    first, last = nodes.ints(1), nodes.ints(2)
    batch_1, new_1 = (nodes.Shape(ids, start=i, end=i + 1) for i in (0, 1))
    rows_1 = nodes.Shape(cache, start=2, end=3)
    rows = nodes.Squeeze(nodes.Add(rows_1, new_1) if growing else rows_1)
    steps_S = nodes.Range(zero, nodes.Squeeze(new_1), one)
    slots_T = nodes.Range(zero, rows, one)
    before_B1 = nodes.Unsqueeze(cache_lengths_B, first)
    total_B = nodes.Add(cache_lengths_B, new_lengths_B)
    total_B1 = nodes.Unsqueeze(total_B, first)
    positions_BS = nodes.Add(before_B1, steps_S)
    filled_BT = nodes.Less(slots_T, total_B1)
    seen_BST = nodes.LessOrEqual(slots_T, nodes.Unsqueeze(positions_BS, last))
    visible_BST = nodes.And(seen_BST, nodes.Unsqueeze(filled_BT, first))
    newest_B = nodes.Max(nodes.Sub(new_lengths_B, one), zero)
    source_BS = nodes.Min(steps_S, nodes.Unsqueeze(newest_B, first))
    active_B = nodes.Greater(new_lengths_B, zero)
    written_BS = nodes.Where(nodes.Unsqueeze(active_B, first), source_BS, nodes.whole(-1))
    place_BS = nodes.Max(nodes.Add(before_B1, written_BS), zero)
    row_B1 = nodes.Unsqueeze(nodes.Range(zero, nodes.Squeeze(batch_1), one), first)
    row_BS = nodes.Expand(row_B1, nodes.Shape(place_BS))
    columns = [
        nodes.Unsqueeze(each, last) for each in (row_BS, nodes.Sub(row_BS, row_BS), place_BS)
    ]
    is_full = nodes.GreaterOrEqual(nodes.ReduceMin(total_B, keepdims=0), rows)
    earliest = nodes.ReduceMin(nodes.sliced(positions_BS, 0, 1, 1), keepdims=0)
    sees_all = nodes.GreaterOrEqual(earliest, nodes.Sub(rows, one))
    new, total = shapes.NEW_TOKENS, None
    batch = shapes.BATCH
    return StepNodes(
        ids=ids,
        new_lengths_B=new_lengths_B,
        batch_1=batch_1,
        new_1=new_1,
        positions_BS=typed(positions_BS, (batch, new), _INT),
        visible_B1ST=typed(nodes.Unsqueeze(visible_BST, first), (batch, 1, new, total), _BOOL),
        filled_B1T1=typed(
            nodes.Unsqueeze(filled_BT, nodes.ints(1, 3)), (batch, 1, total, 1), _BOOL
        ),
        all_visible=typed(nodes.And(is_full, sees_all), (), _BOOL),
        active_B11=typed(nodes.Unsqueeze(active_B, nodes.ints(1, 2)), (batch, 1, 1), _BOOL),
        valid_BS1=typed(
            nodes.Unsqueeze(nodes.Less(steps_S, nodes.Unsqueeze(new_lengths_B, first)), last),
            (batch, new, 1),
            _BOOL,
        ),
        source_BS1=typed(nodes.Unsqueeze(source_BS, last), (batch, new, 1), _INT),
        slot_BS3=typed(nodes.Concat(*columns, axis=2), (batch, new, 3), _INT),
    )
