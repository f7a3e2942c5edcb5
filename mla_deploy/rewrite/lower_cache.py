"""lower: CacheUpdate -> ScatterND, in place when the runtime binds input and output to one buffer.

    # before:  CacheUpdate(cache_B1MW, rows_B1SW, plan) -> cache_out, rows_B1TW
    # after:   ScatterND(cache, slot, rows) -> cache_out;  Where(filled, cache_out, 0) -> rows

    # before:  CacheRead(cache_B1TW, filled, ...) -> rows_B1TW
    # after:   Where(filled, cache, 0)

ONNX Runtime's CPU kernel skips its copy when both pointers are equal (0.005 against 19.7 ms for
144 MiB). A growing cache is first lengthened by S empty slots; its slots are positions too.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mla_deploy.rewrite.rule import (
    DOMAIN,
    Rule,
    as_fp32,
    attribute,
    ints,
    required_dtype,
    required_node,
    static,
)


class LowerCacheUpdate(Rule):
    def __init__(self, name: str, growing: bool) -> None:
        super().__init__(name)
        self.growing = growing

    def pattern(
        self,
        op: Any,
        cache: Any,
        rows: Any,
        filled: Any,
        all_visible: Any,
        active: Any,
        source: Any,
        slot: Any,
    ) -> Any:
        cache_out, rows_out = op.CacheUpdate(
            cache,
            rows,
            filled,
            all_visible,
            active,
            source,
            slot,
            _domain=DOMAIN,
            _outputs=["cache_out", "rows_out"],
            _allow_other_attributes=True,
        )
        return cache_out, rows_out

    def rewrite(
        self,
        op: Any,
        cache: ir.Value,
        rows: ir.Value,
        filled: ir.Value,
        active: ir.Value,
        source: ir.Value,
        slot: ir.Value,
        rows_out: ir.Value,
        **_: Any,
    ) -> Any:
        base_B1MW = self._lengthened(op, cache, source, static(rows, -1)) if self.growing else cache
        new_BSW = op.GatherND(op.Squeeze(rows, ints(op, [1])), source, batch_dims=1)
        held_BSW = as_fp32(op, op.GatherND(base_B1MW, slot), cache)
        written_BSW = op.Where(active, new_BSW, held_BSW)
        if cache.dtype != ir.DataType.FLOAT:
            written_BSW = op.Cast(written_BSW, to=required_dtype(cache))
        cache_out = op.ScatterND(base_B1MW, slot, written_BSW)
        rows_B1TW = as_fp32(op, cache_out, cache)
        if int(attribute(required_node(rows_out), "cleared")):
            rows_B1TW = op.Where(filled, rows_B1TW, op.Constant(value_float=0.0))
        return cache_out, op.Identity(rows_B1TW) if rows_B1TW is cache_out else rows_B1TW

    def _lengthened(self, op: Any, cache: ir.Value, source: ir.Value, width: int) -> ir.Value:
        shape = op.Concat(
            op.Shape(cache, start=0, end=2),
            op.Shape(source, start=1, end=2),
            ints(op, [width]),
            axis=0,
        )
        # ONNX Runtime expands fp32, not bf16.
        empty = op.Expand(op.Constant(value_float=0.0), shape)
        return op.Concat(cache, op.Cast(empty, to=required_dtype(cache)), axis=2)


class LowerCacheRead(Rule):
    def pattern(self, op: Any, cache: Any, filled: Any, all_visible: Any) -> Any:
        return op.CacheRead(cache, filled, all_visible, _domain=DOMAIN, _outputs=["rows"])

    def rewrite(self, op: Any, cache: ir.Value, filled: ir.Value, **_: Any) -> Any:
        return op.Where(filled, as_fp32(op, cache, cache), op.Constant(value_float=0.0))


READ = LowerCacheRead.rule("lower_cache_read")


def rule(growing: bool) -> Any:
    return LowerCacheUpdate.rule("lower_cache_update", growing)
