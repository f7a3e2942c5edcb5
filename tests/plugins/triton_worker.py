"""Runs problems through the Triton kernels on Triton's interpreter: a pickle in, a pickle out.

In a process of its own: whether Triton interprets is settled when it is imported.
"""

from __future__ import annotations

import os
import pickle
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch

from plugins.mla_decode import triton_kernels as kernels
from plugins.mla_decode.reference import Problem


def _tensor(array: Any) -> torch.Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _array(tensor: torch.Tensor) -> Any:
    return tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def run(call: Problem, splits: int) -> tuple[Any, Any, Any]:
    """out_BSHL, and cache and scales after the call. Scratch begins as NaN."""
    batch, new, heads, _ = call.query_BSHE.shape
    capacity = call.cache_B1ME.shape[2]
    rows = 32 if new * heads > 16 and call.storage == "plain" else 16
    query, new_row, cache = (
        _tensor(a) for a in (call.query_BSHE, call.new_row_BSE, call.cache_B1ME)
    )
    cached, fresh = _tensor(call.cache_lengths_B), _tensor(call.new_lengths_B)
    scales = None if call.storage == "plain" else _tensor(call.scales_B1MG)
    partial = torch.full((batch, new * heads, splits, call.latent), float("nan"))
    log_sum = torch.full((batch, new * heads, splits), float("nan"))
    out = torch.full((batch, new, heads, call.latent), float("nan"), dtype=query.dtype)
    storage = kernels.STORAGES.index(call.storage)
    layout = {"L": call.latent, "R": call.rope, "STORAGE": storage, "TILE": call.tile,
              "ROPE_TILE": call.rope_tile}  # fmt: skip
    kernels.append_row[(new, batch)](
        new_row, cache, scales, cached, fresh, new, capacity, cache, scales, **layout
    )
    kernels.attend_split[(-(-new * heads // rows), splits, batch)](
        query, cache, scales, cached, fresh, new, heads, capacity, splits, partial, log_sum,
        SCALE=call.scale, ROWS=rows, TOKENS=kernels.TOKENS,
        WIDE=query.dtype == torch.bfloat16, **layout,
    )  # fmt: skip
    kernels.join_splits[(batch * new * heads,)](partial, log_sum, splits, out, L=call.latent)
    after = cache.view(torch.int16).numpy() if cache.dtype == torch.bfloat16 else cache.numpy()
    return _array(out), after, None if scales is None else scales.numpy()


if __name__ == "__main__":
    jobs = pickle.load(sys.stdin.buffer)
    pickle.dump([run(call, splits) for call, splits in jobs], sys.stdout.buffer)
