"""lower: QuantizedUpdate -> the codes and scales of new rows, scattered in place.

    # before:  QuantizedUpdate(codes_B1MC, scales_B1MG, rows_B1SL, plan) -> both out, rows_B1TL
    # after:   encode(rows) -> ScatterND into codes;  ScatterND into scales
    #          decode(codes out, scales out where filled) -> rows_B1TL, for who reads rows in fp32

    # before:  QuantizedRead(codes_B1TC, scales_B1TG, filled, ...) -> rows_B1TL
    # after:   decode(codes, scales where filled)

A stale slot's scale becomes zero, so its codes need not be looked at. Rows are those of a latent,
or of a rope key where the store has one for it.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mla_deploy.latent_store import find_store
from mla_deploy.rewrite.latent_codes import decode, encode
from mla_deploy.rewrite.rule import (
    DOMAIN,
    Rule,
    as_fp32,
    attribute,
    ints,
    required,
    required_dtype,
    required_node,
    static,
)


class LowerQuantizedUpdate(Rule):
    def pattern(
        self,
        op: Any,
        codes: Any,
        scales: Any,
        rows: Any,
        filled: Any,
        all_visible: Any,
        active: Any,
        source: Any,
        slot: Any,
    ) -> Any:
        codes_out, scales_out, rows_out = op.QuantizedUpdate(
            codes,
            scales,
            rows,
            filled,
            all_visible,
            active,
            source,
            slot,
            _domain=DOMAIN,
            _outputs=["codes_out", "scales_out", "rows_out"],
            _allow_other_attributes=True,
        )
        return codes_out, scales_out, rows_out

    def rewrite(
        self,
        op: Any,
        codes: ir.Value,
        scales: ir.Value,
        rows: ir.Value,
        filled: ir.Value,
        active: ir.Value,
        source: ir.Value,
        slot: ir.Value,
        rows_out: ir.Value,
        **_: Any,
    ) -> Any:
        store = find_store(str(attribute(required_node(rows_out), "store")))
        rank = static(rows, -1)
        new_BSL = op.GatherND(op.Squeeze(rows, ints(op, [1])), source, batch_dims=1)
        made = encode(op, new_BSL, store, rank)
        codes_out = op.ScatterND(codes, slot, op.Where(active, made[0], op.GatherND(codes, slot)))
        held = as_fp32(op, op.GatherND(scales, slot), scales)
        written = op.Where(active, made[1], held)
        if scales.dtype != ir.DataType.FLOAT:
            written = op.Cast(written, to=required_dtype(scales))
        scales_out = op.ScatterND(scales, slot, written)
        cleared = cleared_scales(op, scales_out, filled, scales)
        return codes_out, scales_out, decode(op, codes_out, cleared, store, rank)


class LowerQuantizedRead(Rule):
    def pattern(self, op: Any, codes: Any, scales: Any, filled: Any, all_visible: Any) -> Any:
        return op.QuantizedRead(
            codes,
            scales,
            filled,
            all_visible,
            _domain=DOMAIN,
            _outputs=["rows"],
            _allow_other_attributes=True,
        )

    def rewrite(
        self, op: Any, codes: ir.Value, scales: ir.Value, filled: ir.Value, rows: ir.Value, **_: Any
    ) -> Any:
        store = find_store(str(attribute(required_node(rows), "store")))
        cleared = cleared_scales(op, scales, filled, scales)
        return decode(op, codes, cleared, store, static(rows, -1))


def cleared_scales(op: Any, scales: ir.Value, filled: ir.Value, like: ir.Value) -> ir.Value:
    """In fp32, zero where the slot is stale; they have the dtype of `like`."""
    return required(op.Where(filled, as_fp32(op, scales, like), op.Constant(value_float=0.0)))


RULES = (
    LowerQuantizedUpdate.rule("lower_quantized_update"),
    LowerQuantizedRead.rule("lower_quantized_read"),
)
