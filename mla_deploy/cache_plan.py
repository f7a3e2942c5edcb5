"""What a model of a config caches, by its fields alone: the prediction that measurements meet.

Nothing is traced here. Per layer: a latent row and a rope key (L + R), or in a linear layer the
states of its convolution and its recurrence, or nothing where it reads another layer's rows; beside
them an indexer key where the layer has an indexer of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mla_deploy.config import MlaConfig
from mla_deploy.latent_store import LatentStore
from mla_deploy.layer_facts import FULL, INDEXED, LINEAR, SLIDING, LayerFacts

# Bytes of one element, by the dtype that manifests name.
ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "uint8": 1, "int8": 1}


@dataclass(frozen=True)
class Cached:
    """One kind of tensor that one layer keeps: `elements` of a row, or of a whole state.

    `rows` is None for one row a token, a window's size, or 0 for a state. `fixed`: bytes of an
    element that has its own dtype, as codes and scales have.
    """

    kind: str
    elements: int
    rows: int | None
    fixed: int | None = None

    def row_bytes(self, itemsize: int) -> int:
        """Of one row, or of a state, which is fp32 whatever the cache is."""
        return self.elements * (4 if self.rows == 0 else self.fixed or itemsize)

    def bytes(self, capacity: int, itemsize: int) -> int:
        """Bytes for one batch row."""
        rows = {None: capacity, 0: 1}.get(self.rows, self.rows)
        return self.row_bytes(itemsize) * int(rows or 0)


def cache_plan(config: MlaConfig, store: LatentStore | None = None) -> tuple[Cached, ...]:
    """Everything that is cached for one batch row, layer by layer; latents in the `store`."""
    return tuple(
        cached
        for index, layer in enumerate(config.layers)
        for cached in _layer(config.raw, layer, index, store)
        for _ in range(config.attentions_per_layer)
    )


def planned_bytes(
    config: MlaConfig, *, batch: int, capacity: int, itemsize: int, store: LatentStore | None = None
) -> int:
    """Bytes of a cache of `capacity` tokens a row."""
    return batch * sum(c.bytes(capacity, itemsize) for c in cache_plan(config, store))


def planned_bytes_per_token(
    config: MlaConfig, itemsize: int, store: LatentStore | None = None
) -> int:
    """Bytes that one more token takes, in every cache that has a row for each."""
    return sum(c.row_bytes(itemsize) for c in cache_plan(config, store) if c.rows is None)


def _layer(
    fields: Mapping[str, Any], layer: LayerFacts, index: int, store: LatentStore | None
) -> Iterator[Cached]:
    if layer.kind == LINEAR:
        yield from _states(fields)
        return
    window = _window(fields) if layer.kind == SLIDING else None
    if layer.owns_latent and store is not None and window is None:
        yield from _stored("latent", layer.rank, store)
        rope = layer.row_width - layer.rank
        if store.rope_key is None or rope == 0:
            yield Cached("rope_key_cache", rope, None)
        else:
            yield from _stored("rope_key", rope, store.rope_key)
    elif layer.owns_latent:
        yield Cached("latent_cache", layer.row_width, window)
    if _has_indexer(fields, layer, index):
        width = int(fields["index_head_dim"])
        pooled = fields.get("index_kpool") is not None
        # A pooled indexer caches its gate and whether the token is one, beside its key.
        yield Cached("indexer_key_cache", 2 * width + 1 if pooled else width, None)


def _stored(part: str, values: int, store: LatentStore) -> Iterator[Cached]:
    yield Cached(f"{part}_cache", store.columns(values), None, fixed=1)
    if not store.is_static:
        yield Cached(f"{part}_scale", store.tiles(values), None, fixed=store.scale_bytes)


def _window(fields: Mapping[str, Any]) -> int:
    return int(fields.get("sliding_window") or fields["sliding_window_size"])


def _has_indexer(fields: Mapping[str, Any], layer: LayerFacts, index: int) -> bool:
    if fields.get("index_head_dim") is None or layer.kind in (FULL, SLIDING):
        return layer.kind == INDEXED
    types = fields.get("indexer_types")
    return types is None or types[index] != "shared"


def _states(fields: Mapping[str, Any]) -> Iterator[Cached]:
    """conv [kernel, 3 H K] and recurrent [H, K, K] of delta attention."""
    given = fields.get("linear_attn_config") or {}
    heads = int(fields.get("linear_num_heads") or given["num_heads"])
    width = int(fields.get("linear_head_dim") or given["head_dim"])
    kernel = next(
        int(value)
        for value in (
            fields.get("linear_conv_kernel_dim"),
            fields.get("short_conv_kernel_size"),
            given.get("short_conv_kernel_size"),
        )
        if value
    )
    yield Cached("conv_state", 3 * heads * width * kernel, 0)
    yield Cached("recurrent_state", heads * width * width, 0)
