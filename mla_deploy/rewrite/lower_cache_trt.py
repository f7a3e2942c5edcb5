"""lower: CacheUpdate and CacheRead for TensorRT.

    # before:  CacheUpdate(cache_B1MW, rows_B1SW, plan) -> cache_out, rows_B1TW
    # after:   TensorScatter(cache, rows, write_index_B) -> cache_out = rows
    # or:      ScatterND(cache, slot, Where(active, rows[source], held)) -> cache_out = rows

    # before:  CacheRead(cache_B1TW, filled, ...) -> rows_B1TW
    # after:   the cache itself

TensorScatter becomes KVCacheUpdate, which works in place on a cache that is a graph input, its
result a graph output. It writes every new token, padding too, behind the row's length: a runner
keeps `cache_lengths + new_tokens <= capacity`, for idle rows as well. Stale slots are not cleared,
which would copy the cache; they are masked, and one that began as zeros never holds a NaN there.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from mla_deploy.rewrite import lower_cache
from mla_deploy.rewrite.rule import ints
from mla_deploy.rewrite.step_inputs import step_input


class ScatterInPlace(lower_cache.LowerCacheUpdate):
    def rewrite(self, op: Any, cache: ir.Value, rows: ir.Value, **_: Any) -> Any:
        cache_out = op.TensorScatter(cache, rows, step_input("write_index_B"), axis=-2)
        return cache_out, op.Identity(cache_out)


class ScatterToCopy(lower_cache.LowerCacheUpdate):
    def rewrite(
        self,
        op: Any,
        cache: ir.Value,
        rows: ir.Value,
        active: ir.Value,
        source: ir.Value,
        slot: ir.Value,
        **_: Any,
    ) -> Any:
        new_BSW = op.GatherND(op.Squeeze(rows, ints(op, [1])), source, batch_dims=1)
        written_BSW = op.Where(active, new_BSW, op.GatherND(cache, slot))
        cache_out = op.ScatterND(cache, slot, written_BSW)
        return cache_out, op.Identity(cache_out)


class ReadWhole(lower_cache.LowerCacheRead):
    def rewrite(self, op: Any, cache: ir.Value, **_: Any) -> Any:
        return op.Identity(cache)


IN_PLACE = ScatterInPlace.rule("lower_cache_update", False)
TO_COPY = ScatterToCopy.rule("lower_cache_update", False)
READ = ReadWhole.rule("lower_cache_read")
