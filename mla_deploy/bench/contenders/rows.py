"""Cache rows for contenders to work on: random, of unit size, the same in every process.

What a cache holds changes no time, so caches are filled with numbers: a prefill of 32k tokens
would take minutes. A latent is normalised, hence the unit size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_deploy.runtime.cache_spec import spec_from_manifest

TOKEN = 7  # what every step appends
_INT8_PER_UNIT = 42.0  # three standard deviations fill an int8


def layer_rows(layer: int, tokens: int, width: int) -> NDArray[np.float32]:
    """fp32 [tokens, width] of cache `layer`; fewer tokens are the first of more."""
    return np.random.default_rng(layer).standard_normal((tokens, width), np.float32)


def stored_rows(
    rows_TW: NDArray[np.float32], numpy_type: type[np.generic], *, is_scale: bool = False
) -> NDArray[Any]:
    """`rows_TW` as a cache tensor stores them: bf16 as its bits, integers with `is_scale` beside.

    A scale tensor is constant: the one that makes those integers what they were.
    """
    if is_scale:
        return np.full(rows_TW.shape, 1 / _INT8_PER_UNIT, numpy_type)
    if numpy_type is np.uint16:
        return (np.ascontiguousarray(rows_TW).view(np.uint32) >> 16).astype(np.uint16)
    if np.issubdtype(numpy_type, np.integer):
        return np.clip(np.rint(rows_TW * _INT8_PER_UNIT), -127, 127).astype(numpy_type)
    return rows_TW.astype(numpy_type)


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
    model = manifest["model"]
    rank, rope = int(model["kv_lora_rank"]), int(model["qk_rope_head_dim"])
    for tensor, entry in zip(
        spec_from_manifest(manifest).tensors, manifest["cache"]["tensors"], strict=True
    ):
        parts, is_scale = set(entry["parts"]), "scale" in tensor.kind
        if parts and parts <= {"latent", "rope_key"}:
            both_TW = layer_rows(tensor.layer, tokens, rank + rope)
            start, stop = rank * (parts == {"rope_key"}), rank + rope * ("rope_key" in parts)
            rows_TW = both_TW[:, start:stop]
        else:
            rows_TW = layer_rows(tensor.layer, tokens, tensor.width)
        yield stored_rows(rows_TW, tensor.numpy_type, is_scale=is_scale)
