"""lower: RingUpdate for TensorRT -> Concat for what is read, ScatterND for what is kept.

    # before:  RingUpdate(ring_B1WX, rows_B1SX, filled, source, slot) -> ring_out, rows_B1UX
    # after:   every = Concat(ring, rows) -> rows;  ScatterND(ring, slot, every[source]) -> ring_out

As on a CPU, but slots that hold nothing are not cleared: they are masked, and one that began as
zeros never holds a NaN. A ring is no row for each token, so it is copied: one window, not a
context.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mla_deploy.rewrite import lower_ring
from mla_deploy.rewrite.rule import ints


class RingToCopy(lower_ring.LowerRingUpdate):
    def rewrite(
        self,
        op: Any,
        ring: ir.Value,
        rows: ir.Value,
        source: ir.Value,
        slot: ir.Value,
        **_: Any,
    ) -> Any:
        every_B1UX = op.Concat(ring, rows, axis=2)
        written_BSX = op.GatherND(op.Squeeze(every_B1UX, ints(op, [1])), source, batch_dims=1)
        return op.ScatterND(ring, slot, written_BSX), op.Identity(every_B1UX)


RULE = RingToCopy.rule("lower_ring_update")
