"""Calls the kernels that were compiled for this CPU: the struct of src/step.h through ctypes."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from plugins.mla_decode.device_calls import STORAGES, Sizes, sizes_of
from plugins.mla_decode.reference import DTYPES, Array, Problem


class Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p)
          for name in "query new_row cache scales cached fresh partial log_sum out".split()),
        ("sizes", Sizes),
        ("scale", ctypes.c_float),
    ]  # fmt: skip


@dataclass(frozen=True)
class Order:
    """How a CPU may take a block's work: warps backwards, copies as late as they may be."""

    reversed: bool = False
    late: bool = False


def run(
    kernels: ctypes.CDLL, given: Problem, dtype: str, *, blocks: int = 4, order: Order | None = None
) -> tuple[Array, Problem, int]:
    """out_BSHL, the problem with its cache after the call, and how many splits there were."""
    call, order = given.copied(), order or Order()
    batch, new, heads, _ = call.query_BSHE.shape
    out = np.full((batch, new, heads, call.latent), np.nan, DTYPES[dtype])
    arrays = (call.query_BSHE, call.new_row_BSE, call.cache_B1ME, call.scales_B1MG,
              call.cache_lengths_B, call.new_lengths_B)  # fmt: skip
    assert all(array.flags.c_contiguous for array in arrays)
    pointers = [array.ctypes.data for array in arrays]
    step = Step(*pointers, None, None, out.ctypes.data, sizes_of(call), call.scale)
    storage = STORAGES.index(call.storage)
    refused = kernels.mla_decode_on_host(
        ctypes.byref(step), list(DTYPES).index(dtype), storage, blocks,
        int(order.reversed), int(order.late),
    )  # fmt: skip
    assert refused == 0
    return out, call, int(step.sizes.splits)
