"""What a model of a config caches, by its fields alone: the prediction that measurements meet.

Nothing is traced here. Per layer: a latent row and a rope key (L + R), or in a linear layer the
states of its convolution and its recurrence, or nothing where it reads another layer's rows; beside
them an indexer key where the layer has an indexer of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mla_deploy.config import MlaConfig

LINEAR, SLIDING, INDEXED = "linear_attention", "sliding_attention", "indexed_attention"
_NO_ROWS = ("reuse", "reuse_but_indexer")


@dataclass(frozen=True)
class Cached:
    """One kind of tensor that one layer keeps: `elements` of a row, or of a whole state.

    `rows` is None for one row a token, a window's size, or 0 for a state.
    """

    kind: str
    elements: int
    rows: int | None

    def bytes(self, capacity: int, itemsize: int) -> int:
        """Bytes for one batch row; a state is fp32 whatever the cache is."""
        if self.rows == 0:
            return self.elements * 4
        return self.elements * (self.rows or capacity) * itemsize


def cache_plan(config: MlaConfig) -> tuple[Cached, ...]:
    """Everything that is cached for one batch row, layer by layer."""
    return tuple(
        cached for layer in range(_layers(config)) for cached in _layer(config.raw, config, layer)
    )


def planned_bytes(config: MlaConfig, *, batch: int, capacity: int, itemsize: int) -> int:
    """Bytes of a cache of `capacity` tokens a row."""
    return batch * sum(c.bytes(capacity, itemsize) for c in cache_plan(config))


def planned_bytes_per_token(config: MlaConfig, itemsize: int) -> int:
    """Bytes that one more token takes, in every cache that has a row for each."""
    return sum(c.elements * itemsize for c in cache_plan(config) if c.rows is None)


def _layers(config: MlaConfig) -> int:
    """How many caches there are: one a layer, or two where a layer has two attentions."""
    fields = config.raw
    twice = fields.get("zero_expert_num") is not None and fields.get("num_layers") is not None
    return 2 * int(fields["num_layers"]) if twice else config.num_layers


def _layer(fields: Mapping[str, Any], config: MlaConfig, layer: int) -> Sequence[Cached]:
    kind = _at(fields.get("layer_types"), layer) or ""
    if kind == LINEAR:
        return _states(fields)
    window = int(fields["sliding_window"]) if kind == SLIDING else None
    found = []
    if _at(fields.get("kv_sharing_modes"), layer) not in _NO_ROWS:
        rank, rope = _widths(fields, config, layer, sliding=kind == SLIDING)
        found.append(Cached("latent_cache", rank + rope, window))
    if _has_indexer(fields, kind, layer):
        width = int(fields["index_head_dim"])
        pooled = fields.get("index_kpool") is not None
        # A pooled indexer caches its gate and whether the token is one, beside its key.
        found.append(Cached("indexer_key_cache", 2 * width + 1 if pooled else width, None))
    return found


def _widths(
    fields: Mapping[str, Any], config: MlaConfig, layer: int, *, sliding: bool
) -> tuple[int, int]:
    """(L, R) of a layer."""
    if sliding and fields.get("swa_kv_lora_rank") is not None:
        rope = fields.get("swa_qk_rope_head_dim", config.qk_rope_head_dim)
        return int(fields["swa_kv_lora_rank"]), int(rope)
    turned = _at(fields.get("no_rope_layers"), layer)
    return config.kv_lora_rank, 0 if turned in (0, False) else config.qk_rope_head_dim


def _has_indexer(fields: Mapping[str, Any], kind: str, layer: int) -> bool:
    if fields.get("index_head_dim") is None or kind not in ("", INDEXED):
        return False
    return _at(fields.get("indexer_types"), layer) != "shared"


def _states(fields: Mapping[str, Any]) -> Sequence[Cached]:
    """conv [3 H K, kernel] and recurrent [H, K, K] of delta attention."""
    given = fields.get("linear_attn_config") or {}
    heads = int(fields.get("linear_num_heads") or given["num_heads"])
    width = int(fields.get("linear_head_dim") or given["head_dim"])
    kernel = int(fields.get("linear_conv_kernel_dim") or given["short_conv_kernel_size"])
    return (
        Cached("conv_state", 3 * heads * width * kernel, 0),
        Cached("recurrent_state", heads * width * width, 0),
    )


def _at(values: Any, layer: int) -> Any:
    return values[layer] if isinstance(values, list | tuple) and layer < len(values) else None
