"""What a weight is for, told by its name: a plan gives each role its form."""

from __future__ import annotations

import re

_EXPERT = re.compile(r"\.experts\.")
_LEFT_ALONE = re.compile(r"\.indexer\.|\.rope_select\.")


def role_of(name: str) -> str:
    """A role of `form.ROLES`, or "indexer": what chooses tokens or pairs is never rounded."""
    if _LEFT_ALONE.search(name):
        return "indexer"
    if _EXPERT.search(name):
        return "experts"
    return "kv_b" if name.endswith("kv_b_proj.weight") else "linear"
