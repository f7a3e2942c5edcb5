"""Whether a cache fits the memory that is free, told before anything is reserved.

Weights are mapped: where they fit, they have to stay in memory beside the cache, or every step
reads them from disk. Where they alone do not fit they are read from disk anyway, and the cache has
all of the memory. Weights that are held have to fit.
"""

from __future__ import annotations

from collections.abc import Callable

from mla_deploy import machine
from mla_deploy.errors import EnvironmentFailure
from mla_deploy.runtime.cache_spec import CacheSpec


def require_memory(
    spec: CacheSpec, batch: int, capacity: int, weight_bytes: int, *, is_held: bool = False
) -> None:
    """Nothing is refused where the system does not say what is free.

    Raises: EnvironmentFailure RUN-MEMORY with what would fit; InputError SHAPE-OVERFLOW.
    """
    wanted, free = spec.bytes(batch, capacity), machine.available_bytes()
    if free is None:
        return
    room = free - weight_bytes if is_held or weight_bytes < free else free
    if wanted <= room:
        return
    fits_capacity = _most(capacity, lambda count: spec.bytes(batch, count) <= room)
    fits_batch = _most(batch, lambda count: spec.bytes(count, capacity) <= room)
    raise EnvironmentFailure(
        "RUN-MEMORY",
        f"a cache of {wanted:,} bytes ({batch} rows of {capacity} tokens) does not fit: "
        f"{free:,} bytes are free, weights take {free - room:,} of them",
        hint=_hint(f"capacity {fits_capacity}" if fits_capacity else "", fits_batch, is_held),
        cache_bytes=wanted,
        weight_bytes=weight_bytes,
        available_bytes=free,
        fits_capacity=fits_capacity,
        fits_batch=fits_batch,
    )


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest count below `limit` that fits, 0 when none does."""
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _hint(capacity: str, batch: int, is_held: bool) -> str:
    ways = [capacity, f"batch {batch}" if batch else "", "weights not held" if is_held else ""]
    told = " or ".join(filter(None, ways))
    if told:
        return f"what would fit: {told}; a bundle in half precision takes half"
    return "not one token fits: free memory, or export with a narrower --dtype"
