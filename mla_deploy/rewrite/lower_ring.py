"""lower: RingUpdate -> Concat for what is read, ScatterND for what is kept.

    # before:  RingUpdate(ring_B1WX, rows_B1SX, filled, source, slot) -> ring_out, rows_B1UX
    # after:   every = Concat(ring, rows);  Where(filled, every, 0) -> rows
    #          ScatterND(ring, slot, every[source]) -> ring_out

A query needs rows that its own call overwrites, so the ring is read before it is written. What is
copied is one window, however long the context is.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mla_deploy.rewrite.rule import DOMAIN, Rule, as_fp32, ints, required_dtype


class LowerRingUpdate(Rule):
    def pattern(self, op: Any, ring: Any, rows: Any, filled: Any, source: Any, slot: Any) -> Any:
        ring_out, rows_out = op.RingUpdate(
            ring, rows, filled, source, slot, _domain=DOMAIN, _outputs=["ring_out", "rows_out"]
        )
        return ring_out, rows_out

    def rewrite(
        self,
        op: Any,
        ring: ir.Value,
        rows: ir.Value,
        filled: ir.Value,
        source: ir.Value,
        slot: ir.Value,
        **_: Any,
    ) -> Any:
        every_B1UX = op.Concat(as_fp32(op, ring, ring), rows, axis=2)
        written_BSX = op.GatherND(op.Squeeze(every_B1UX, ints(op, [1])), source, batch_dims=1)
        if ring.dtype != ir.DataType.FLOAT:
            written_BSX = op.Cast(written_BSX, to=required_dtype(ring))
        ring_out = op.ScatterND(ring, slot, written_BSX)
        return ring_out, op.Where(filled, every_B1UX, op.Constant(value_float=0.0))


RULE = LowerRingUpdate.rule("lower_ring_update")
