"""Token counts as people write them: `512,2k,8k`."""

from __future__ import annotations

_FACTORS = {"k": 1 << 10, "m": 1 << 20}


def token_counts(text: str) -> tuple[int, ...]:
    """`512,2k` as (512, 2048): whole numbers above zero, k and m for 1024 and its square.

    Raises: ValueError, with what was found and wanted.
    """
    return tuple(_count(part.strip().lower()) for part in text.split(","))


def count_text(count: int) -> str:
    """The short spelling of a count: 2048 is `2k`, 2000 is `2000`."""
    thousands, rest = divmod(count, 1 << 10)
    return f"{thousands}k" if thousands and not rest else str(count)


def _count(part: str) -> int:
    digits, factor = (part[:-1], _FACTORS[part[-1]]) if part[-1:] in _FACTORS else (part, 1)
    if not (digits.isascii() and digits.isdigit() and int(digits) > 0):
        raise ValueError(f"{part!r} is no count of tokens; wanted such as 512,2k,8k")
    return int(digits) * factor
