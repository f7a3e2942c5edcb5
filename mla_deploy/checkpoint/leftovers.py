"""Tensors that no parameter of the module is made of: skipped by rule and counted, or refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from mla_deploy.checkpoint.names import UNUSED_NORM_PATTERN, is_unused_norm, skip_pattern
from mla_deploy.checkpoint.search import Search, listed
from mla_deploy.errors import InputError


def skipped_tensors(search: Search, tied_on_disk: Mapping[str, str]) -> dict[str, int]:
    """Pattern -> how many tensors it lets be left over.

    Raises: InputError CKPT-EXTRA.
    """
    config = search.checkpoint.config
    canonical_of = {name: canonical for canonical, name in search.names.items()}
    tied_of = {on_disk: name for name, on_disk in tied_on_disk.items()}
    prediction = search.text.prediction_layers(config.num_layers)
    counts: Counter[str] = Counter()
    extra: list[str] = []
    for name in search.checkpoint.tensors.keys() - search.used:
        canonical = canonical_of.get(name)
        pattern = skip_pattern(name, canonical, prediction, towers=bool(config.towers))
        if name in tied_of:
            pattern = f"{tied_of[name]} (tied)"
        elif pattern is None and canonical and is_unused_norm(canonical, search.wanted):
            pattern = UNUSED_NORM_PATTERN
        if pattern is None:
            extra.append(name)
        else:
            counts[pattern] += 1
    if extra:
        raise InputError(
            "CKPT-EXTRA",
            f"{len(extra)} tensors belong to no part of the model: {listed(sorted(extra))}",
            hint="config.json may be of another revision, or of a sibling model",
            tensors=sorted(extra)[:10],
        )
    return dict(sorted(counts.items()))
