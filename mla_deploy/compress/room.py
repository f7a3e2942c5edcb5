"""What a token takes in each form of the cache, and how many tokens fit on a device.

Forms: keys and values of every query head, as an attention without groups caches them; the source's
own; this latent in 16 bits and in each store of `latent_store.py`. A device holds the weights in 16
bits, twice where an engine for prefill and one for decoding are built, as `plan` has it; what is
left is cache. Activations are not counted: `mla-deploy plan` on the result tells them too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mla_deploy.devices import find_device
from mla_deploy.latent_store import STORES

Facts = Mapping[str, Any]
CONTEXTS = (4096, 32768, 131072)
DEVICES = ("orin-nano-8", "agx-orin-64", "rtx-4090", "h100")
_STORES = ("int8", "int8-all", "int4", "int4-all")
_GIB = 1 << 30


@dataclass(frozen=True)
class CacheForm:
    """`token_bytes`: of one token, all layers. `is_chosen`: what the report's loss is of."""

    name: str
    token_bytes: int
    is_latent: bool
    is_chosen: bool = False


def cache_forms(report: Facts) -> tuple[CacheForm, ...]:
    """From the largest kind to the smallest."""
    return tuple(_forms(report))


def _forms(report: Facts) -> Iterator[CacheForm]:
    heads, layers = report["source_heads"], report["layers"]
    queries, groups = heads["query"], heads["key"]
    if queries > groups:
        every = 2 * 2 * layers * queries * heads["width"]
        yield CacheForm(f"MHA: keys and values of all {queries} heads, 16 bits", every, False)
    kind = "MHA" if queries == groups else "MQA" if groups == 1 else "GQA"
    own = 2 * report["cached_values_source"]
    count = f"{groups} key heads" if groups > 1 else "one key head"
    yield CacheForm(f"{kind}: the source's {count}, 16 bits", own, False)
    stored, widths = report["cache_dtype"], report["widths"]
    plain = stored not in STORES
    yield CacheForm("this latent, 16 bits", 2 * report["cached_values"], True, plain)
    for name in _STORES:
        if any(rank % 2 for rank, _ in widths) and STORES[name].bits == 4:
            continue
        size = sum(STORES[name].row_bytes(rank, rope) for rank, rope in widths)
        yield CacheForm(f"this latent, {name}", size, True, name == stored)
    if not plain and stored not in _STORES:
        size = report["cached_bytes"]
        yield CacheForm(f"this latent, {stored}", size, True, is_chosen=True)


def tokens_that_fit(report: Facts, name: str, token_bytes: int) -> int:
    """On a device by that name, beside the weights of this model."""
    device = find_device(name)
    copies = 1 if device.row.release is None else 2
    usable = int((device.memory_gib - device.reserved_gib) * _GIB)
    return max(0, usable - copies * 2 * report["parameters"]) // token_bytes
