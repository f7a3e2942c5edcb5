"""Cache rows for contenders to work on: random, of unit size, the same in every process.

What a cache holds changes no time, so caches are filled with numbers: a prefill of 32k tokens
would take minutes. A latent is normalised, hence the unit size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_deploy.latent_store import LatentStore
from mla_deploy.runtime.cache_spec import CacheTensor, spec_from_manifest
from mla_deploy.source.latent_values import encode

TOKEN = 7  # what every step appends
_SCALES = "_scale"


def layer_rows(layer: int, tokens: int, width: int) -> NDArray[np.float32]:
    """fp32 [tokens, width] of cache `layer`; fewer tokens are the first of more."""
    return np.random.default_rng(layer).standard_normal((tokens, width), np.float32)


def stored_rows(
    rows_TW: NDArray[np.float32], tensor: CacheTensor, store: LatentStore | None
) -> NDArray[Any]:
    """`rows_TW` as one cache tensor stores them: bf16 as its bits, codes, or their scales."""
    if store is not None:
        return encode(rows_TW, store)[tensor.kind.endswith(_SCALES)]
    if tensor.dtype == "bf16":
        return (np.ascontiguousarray(rows_TW).view(np.uint32) >> 16).astype(np.uint16)
    return rows_TW.astype(tensor.numpy_type)


def prompt_ids(tokens: int, vocab_size: int) -> list[int]:
    """Token ids for a prefill, spread over the vocabulary."""
    return np.random.default_rng(tokens).integers(0, vocab_size, tokens).tolist()


def only_token_rows(manifest: Mapping[str, Any]) -> bool:
    """Whether a bundle keeps rows of tokens and nothing else: no ring, no state."""
    return all(tensor["rows"] == "tokens" for tensor in manifest["cache"]["tensors"])


def only_latent_rows(manifest: Mapping[str, Any]) -> bool:
    """Whether those rows are the latent and its rope key, which every peer keeps too.

    Other caches of peers cannot be filled with numbers; they read real tokens.
    """
    tensors = manifest["cache"]["tensors"]
    return only_token_rows(manifest) and not any("indexer" in str(t["kind"]) for t in tensors)


def cache_rows(manifest: Mapping[str, Any], tokens: int) -> Iterator[NDArray[Any]]:
    """What each cache tensor of a bundle stores, in their order: [tokens, width].

    Latent and rope key are columns of one `layer_rows(layer, tokens, L + R)`.
    """
    model, spec = manifest["model"], spec_from_manifest(manifest)
    rank, rope = int(model["kv_lora_rank"]), int(model["qk_rope_head_dim"])
    for tensor, entry in zip(spec.tensors, manifest["cache"]["tensors"], strict=True):
        parts = set(entry["parts"])
        if parts and parts <= {"latent", "rope_key"}:
            both_TW = layer_rows(tensor.layer, tokens, rank + rope)
            start, stop = rank * (parts == {"rope_key"}), rank + rope * ("rope_key" in parts)
            rows_TW = np.ascontiguousarray(both_TW[:, start:stop])
        else:
            rows_TW = layer_rows(tensor.layer, tokens, tensor.width)
        yield stored_rows(rows_TW, tensor, spec.store_of(tensor))
