"""The attention steps of `graphs.py` over a latent that is stored as codes and scales; so is its
rope key where the store has one for it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_deploy.latent_store import LatentStore
from mla_deploy.source.latent_values import decode, encode, rounded
from tests.rewrite.graphs import Arrays, L, R, attention_feeds, attention_text

_KINDS = {"fp32": "float", "fp16": "float16"}
_TYPES = {"fp32": np.float32, "fp16": np.float16}
# Of a plain step's cache: its codes, its scales.
NAMES = {"cache0": ("codes", "scales"), "cache1": ("key_codes", "key_scales")}


def kept(store: LatentStore, rope: int) -> list[tuple[str, str, int, LatentStore]]:
    """(cache, rows, width, store) of what is codes."""
    found = [("cache0", "latent", L, store)]
    if store.rope_key is not None and rope:
        found.append(("cache1", "rope_key", rope, store.rope_key))
    return found


def quantized_text(store: LatentStore, **form: Any) -> str:
    """`attention_text`, split, with `cache0` as `codes` and `scales`, and `cache1` likewise."""
    text = attention_text(split=True, **form)
    for cache, rows, width, part in kept(store, form.get("rope", R)):
        codes, scales = NAMES[cache]
        wide = f"float[batch,1,total,{width}] {cache}"
        kinds = (
            f"uint8[batch,1,total,{part.columns(width)}] {codes}",
            f"{_KINDS[part.scale_dtype]}[batch,1,total,{part.tiles(width)}] {scales}",
        )
        out = ", ".join(f"{kind}_out" for kind in kinds)
        text = text.replace(f"{wide}_out", out).replace(wide, ", ".join(kinds))
        named = f'<store: string = "{part.name}">'
        text = text.replace(
            f"{rows} = mla_deploy.CacheRead ({cache}, filled, all_visible)",
            f"{rows} = mla_deploy.QuantizedRead {named} ({codes}, {scales}, filled, all_visible)",
        )
        text = text.replace(
            f"{cache}_out, {rows} = mla_deploy.CacheUpdate <cleared: int = 1> ({cache},",
            f"{codes}_out, {scales}_out, {rows} = mla_deploy.QuantizedUpdate {named} ({codes}, "
            f"{scales},",
        )
        assert cache not in text
    return text


def quantized_feeds(store: LatentStore, **form: Any) -> tuple[Arrays, Arrays]:
    """Feeds of the quantised graph; and those that the same rounding gives a plain one.

    Slots that were never written hold codes of all ones and scales of NaN.
    """
    plain = attention_feeds(split=True, **form)
    feeds, new, first = dict(plain), plain["new_rows"].copy(), 0
    for cache, _, width, part in kept(store, form.get("rope", R)):
        held = feeds.pop(cache)
        is_stale = np.isnan(held[..., :1])
        codes, scales = encode(np.where(is_stale, np.float32(1), held), part)
        stale: NDArray[Any] = np.array(np.nan, _TYPES[part.scale_dtype])
        for name, made, one in zip(
            NAMES[cache], (codes, scales), (np.uint8(255), stale), strict=True
        ):
            feeds[name] = np.where(is_stale, one, made)
        rows = slice(first, first + width)
        new[..., rows] = rounded(np.ascontiguousarray(new[..., rows]), part)
        plain[cache] = np.where(is_stale, np.float32(np.nan), decode(codes, scales, part))
        first += width
    return feeds, {**plain, "new_rows": new}
