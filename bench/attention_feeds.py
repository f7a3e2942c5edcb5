"""Random caches, queries and weights for the attention bench, latent and expanded."""

from __future__ import annotations

import numpy as np
from attention_graphs import Sizes

from mla_deploy.bench.sessions import Arrays


def latent_feeds(s: Sizes, total: int, rng: np.random.Generator) -> Arrays:
    """A cache of `total` rows of which the last is written by the step, and the weights."""
    normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    w_HKL = normal(s.heads, s.nope + s.value, s.rank) * np.float32(s.rank**-0.5)
    true = np.array(True)
    return {
        "query": normal(1, s.heads, 1, s.nope + s.rope), "rows": normal(1, 1, 1, s.rank + s.rope),
        "cache": normal(1, 1, total, s.rank + s.rope), "w_kv_b": w_HKL.reshape(-1, s.rank),
        "w_kv_b.w_uk_HNL": np.ascontiguousarray(w_HKL[:, : s.nope]),
        "w_kv_b.w_uv_HLV": np.ascontiguousarray(w_HKL[:, s.nope :].swapaxes(1, 2)),
        "filled": np.full((1, 1, total, 1), True), "all_visible": true,
        "active": np.full((1, 1, 1), True), "visible": np.full((1, 1, 1, total), True),
        "source": np.zeros((1, 1, 1), np.int64), "slot": np.array([[[0, 0, total - 1]]], np.int64),
        "slots": np.array([[[[0, h, total - 1]] for h in range(s.heads)]], np.int64),
    }  # fmt: skip


def expanded_feeds(s: Sizes, feeds: Arrays) -> Arrays:
    """The same cache with heads expanded: key [1, H, T, N+R], value [1, H, T, V]."""
    rows_TW = feeds["cache"][0, 0]
    both_HTE = np.einsum("tl,hel->hte", rows_TW[:, : s.rank],
                         feeds["w_kv_b"].reshape(s.heads, -1, s.rank), optimize=True)  # fmt: skip
    rope_HTR = np.broadcast_to(rows_TW[:, s.rank :], (s.heads, len(rows_TW), s.rope))
    key = np.concatenate((both_HTE[..., : s.nope], rope_HTR), axis=-1)[None]
    return {**feeds, "key": key, "value": np.ascontiguousarray(both_HTE[None, ..., s.nope :])}


def without_last(feeds: Arrays) -> Arrays:
    """The cache before the step: `Attention` appends the new row itself."""
    past = {name: np.ascontiguousarray(feeds[name][:, :, :-1]) for name in ("key", "value")}
    return {**feeds, **past}
