"""The products of attention by the letters of their axes, whatever a graph is written in.

An einsum has letters of its own; ours are S for new tokens, T for cached tokens, E for what query
and key are summed over, V for the width of a value. Sizes are as a graph tells them: "S" is the
number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

Letters = tuple[str, str, str]  # of the two operands, and of the result
# A score at or below this is hidden: its weight is zero in fp32.
HIDDEN = -1e4


def einsum_letters(equation: str) -> Letters | None:
    """Of a product of two operands that names its result; None for any other."""
    inputs, _, out = equation.replace(" ", "").partition("->")
    parts = inputs.split(",")
    if len(parts) != 2 or not out or "." in equation:
        return None
    return parts[0], parts[1], out


def matmul_letters(ranks: Sequence[int], ends: Sequence[str] = ("mk", "kn")) -> Letters:
    """Of a matrix product of operands of two axes or more; `ends` are their last two."""
    batch = "abcdefgh"[: max(ranks) - 2]
    left, right = (batch[len(batch) - (rank - 2) :] for rank in ranks)
    return f"{left}{ends[0]}", f"{right}{ends[1]}", f"{batch}mn"


def names_of_scores(
    letters: Letters, sizes: Sequence[object], cached: int
) -> tuple[bool, dict[str, str]] | None:
    """Whether the key comes first, and our names, of a product whose axis `cached` is all tokens.

    None where it does not sum over one axis of queries and keys.
    """
    left, right, out = letters
    token = out[cached]
    is_key_first = token in left
    query, key = (right, left) if is_key_first else (left, right)
    summed = [letter for letter in query if letter in key and letter not in out]
    if token in query or len(summed) != 1:
        return None
    new = _new_tokens(out, sizes, token)
    names = {token: "T", summed[0]: "E", **({new[0]: "S"} if len(new) == 1 else {})}
    return is_key_first, names


def names_of_values(
    weights: str, values: str, out: str, sizes: Sequence[object], cached: int
) -> dict[str, str] | None:
    """Our names of a product of weights, whose axis `cached` is all tokens, with values.

    `sizes` are those of the weights. None where it does not sum over the tokens.
    """
    token = weights[cached]
    if token in out or token not in values:
        return None
    names = {token: "T", **dict.fromkeys(_new_tokens(weights, sizes, token), "S")}
    return names | {letter: "V" for letter in values if letter not in weights}


def _new_tokens(letters: str, sizes: Sequence[object], token: str) -> list[str]:
    return [
        letter
        for letter, size in zip(letters, sizes, strict=True)
        if size == "S" and letter != token
    ]
