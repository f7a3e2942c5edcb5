"""Axes and bytes: letters that tensor names end with, the graph's dim names, cache arithmetic."""

from __future__ import annotations

from math import prod

from mla_deploy.errors import InputError

AXES = {
    "B": "batch rows",
    "S": "new tokens in this call",
    "T": "cached tokens after this call",
    "P": "cached tokens before this call",
    "M": "cache capacity in tokens",
    "H": "query heads",
    "N": "no-position part of a head",
    "R": "rotary part of a head",
    "V": "value part of a head",
    "E": "whole query or key head, N + R (experts in expert weights)",
    "L": "latent rank",
    "W": "cache row width, L + R",
    "Q": "query rank",
    "D": "model width",
    "I": "inner width of an expert",
}

# Symbolic dims of every graph we write.
BATCH = "batch"
NEW_TOKENS = "new_tokens"
PAST_TOKENS = "past_tokens"
CAPACITY = "capacity"
VERIFIED_TOKENS = "verified_tokens"  # new_tokens up to MOST_VERIFIED, and 1 beyond

EXPANDED = "expanded"  # input of a joined graph: true for what the prefill graph computes
MOST_VERIFIED = 8  # new tokens per row whose logits a decode graph gives in one call

_INT64_MAX = 2**63 - 1
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def checked_product(*factors: int) -> int:
    """The product of positive integers, refused when it does not fit int64.

    Raises: InputError SHAPE-RANGE (a factor below 1), SHAPE-OVERFLOW.
    """
    for factor in factors:
        if factor < 1:
            raise InputError("SHAPE-RANGE", f"found a size of {factor}, wanted at least 1")
    total = prod(factors)
    if total > _INT64_MAX:
        raise InputError(
            "SHAPE-OVERFLOW",
            f"{' x '.join(map(str, factors))} does not fit 64 bits",
            hint="a smaller capacity or batch is needed",
        )
    return total


def cache_bytes(
    *, num_layers: int, batch: int, capacity: int, row_width: int, itemsize: int
) -> int:
    """Bytes of a latent cache: layers x batch x capacity x (L + R) x itemsize.

    Raises: InputError SHAPE-RANGE, SHAPE-OVERFLOW.
    """
    return checked_product(num_layers, batch, capacity, row_width, itemsize)


def byte_text(count: float) -> str:
    """Bytes for people: `21.6 KiB`; exact below one KiB."""
    size, unit = float(count), 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{count:.0f} B" if unit == 0 else f"{size:.1f} {_UNITS[unit]}"
