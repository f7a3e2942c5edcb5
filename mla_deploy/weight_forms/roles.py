"""What a weight is for, told by its name: a plan gives each role its form."""

from __future__ import annotations

import re

_EXPERT = re.compile(r"\.experts\.")
# The first that matches; families name these alike, with or without a query rank.
_ENDINGS = tuple(
    (role, re.compile(rf"(?:^|\.){ending}\.weight$"))
    for role, ending in (
        ("kv_b", "kv_b_proj"),
        ("kv_a", "kv_a_proj(?:_with_mqa)?"),
        ("q", "q(?:_[ab])?_proj"),
        ("o", "o_proj"),
        ("down", "down_proj"),
    )
)
_LEFT_ALONE = re.compile(r"\.indexer\.|\.rope_select\.")


def role_of(name: str) -> str:
    """A role of `form.ROLES`, or "indexer": what chooses tokens or pairs is never rounded."""
    if _LEFT_ALONE.search(name):
        return "indexer"
    if _EXPERT.search(name):
        return "experts"
    return next((role for role, ending in _ENDINGS if ending.search(name)), "linear")
