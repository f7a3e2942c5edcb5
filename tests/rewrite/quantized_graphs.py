"""The attention steps of `graphs.py` over a latent that is stored as codes and scales."""

from __future__ import annotations

from typing import Any

import numpy as np

from mla_deploy.latent_store import LatentStore
from mla_deploy.source.latent_values import decode, encode, rounded
from tests.rewrite.graphs import Arrays, L, attention_feeds, attention_text

_READ = "latent = mla_deploy.CacheRead (cache0, filled, all_visible)"
_UPDATE = "cache0_out, latent = mla_deploy.CacheUpdate <cleared: int = 1> (cache0,"


def quantized_text(store: LatentStore, **form: Any) -> str:
    """`attention_text`, split, with `cache0` as `codes` and `scales`."""
    text = attention_text(split=True, **form)
    wide = f"float[batch,1,total,{L}] cache0"
    kinds = (
        f"uint8[batch,1,total,{store.columns(L)}] codes",
        f"float[batch,1,total,{store.tiles(L)}] scales",
    )
    out = ", ".join(f"{kind}_out" for kind in kinds)
    text = text.replace(f"{wide}_out", out).replace(wide, ", ".join(kinds))
    named = f'<store: string = "{store.name}">'
    text = text.replace(_READ, f"latent = mla_deploy.QuantizedRead {named} (codes, scales, filled, "
                        "all_visible)")  # fmt: skip
    update = f"codes_out, scales_out, latent = mla_deploy.QuantizedUpdate {named} (codes, scales,"
    changed = text.replace(_UPDATE, update)
    assert "cache0" not in changed
    return changed


def quantized_feeds(store: LatentStore, **form: Any) -> tuple[Arrays, Arrays]:
    """Feeds of the quantised graph; and those that the same rounding gives a plain one.

    Slots that were never written hold codes of all ones and scales of NaN.
    """
    plain = attention_feeds(split=True, **form)
    held = plain["cache0"]
    is_stale = np.isnan(held[..., :1])
    codes, scales = encode(np.where(is_stale, np.float32(1), held), store)
    feeds = {
        **plain,
        "codes": np.where(is_stale, np.uint8(255), codes),
        "scales": np.where(is_stale, np.float32(np.nan), scales),
    }
    del feeds["cache0"]
    new = plain["new_rows"].copy()
    new[..., :L] = rounded(np.ascontiguousarray(new[..., :L]), store)
    plain = {**plain, "new_rows": new}
    plain["cache0"] = np.where(is_stale, np.float32(np.nan), decode(codes, scales, store))
    return feeds, plain
