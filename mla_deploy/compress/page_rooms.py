"""The part of the page that says what the cache takes, and what fits on a device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mla_deploy.compress.room import CONTEXTS, DEVICES, CacheForm, cache_forms, tokens_that_fit
from mla_deploy.devices import find_device
from mla_deploy.shapes import byte_text

Facts = Mapping[str, Any]


def room_facts(report: Facts) -> dict[str, Any]:
    """What `rooms.html.jinja` shows."""
    forms = cache_forms(report)
    return {
        "contexts": [f"{tokens // 1024}k" for tokens in CONTEXTS],
        "cache_rows": list(_rows(forms)),
        "devices": [find_device(name).title for name in DEVICES],
        "fitting": list(_fitting(report, forms)),
        "longest_text": f"{report['longest_text']:,}",
        "weights": byte_text(2 * report["parameters"]),
    }


def _rows(forms: Sequence[CacheForm]) -> Iterator[dict[str, Any]]:
    most = max(each.token_bytes for each in forms)
    own = next(each.token_bytes for each in forms if not each.is_latent and "source" in each.name)
    for each in forms:
        yield {
            "name": each.name,
            "chosen": each.is_chosen,
            "kind": "measured" if each.is_latent else "other",
            "bar": round(max(100 * each.token_bytes / most, 0.6), 2),
            "token": f"{each.token_bytes:,}",
            "share": f"{100 * each.token_bytes / own:.0f} %",
            "sizes": [byte_text(each.token_bytes * tokens) for tokens in CONTEXTS],
        }


def _fitting(report: Facts, forms: Sequence[CacheForm]) -> Iterator[dict[str, Any]]:
    longest = report["longest_text"]
    for each in forms:
        counts = [tokens_that_fit(report, name, each.token_bytes) for name in DEVICES]
        yield {
            "name": each.name,
            "chosen": each.is_chosen,
            "counts": [(_count_text(count), _texts(count, longest)) for count in counts],
        }


def _count_text(tokens: int) -> str:
    if tokens < 10_000_000:
        return f"{tokens:,}"
    return f"{tokens / 1e6:,.0f} million"


def _texts(tokens: int, longest: int) -> str:
    if tokens < longest:
        return "the longest context" if tokens else "the weights do not fit"
    count = tokens // longest
    return f"{count:,} text{'s' if count > 1 else ''} of {longest:,}"
