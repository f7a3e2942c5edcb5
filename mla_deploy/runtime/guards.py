"""Checks of a call before it runs: batch, token ids, room in the cache. Nothing is changed here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mla_deploy.errors import InputError, quoted

Rows = tuple[NDArray[np.int64], ...]
Tokens = Sequence[int] | None  # None: the row is idle in this call


def checked_rows(
    rows: Sequence[Tokens], lengths_B: NDArray[np.int64], capacity: int, vocab_size: int
) -> Rows:
    """`rows` as int64 arrays, one per row of the batch, that are safe to append; idle ones empty.

    Raises: InputError RUN-BATCH (another number of rows), RUN-EMPTY (a row without tokens, or none
    but idle ones), RUN-TOKEN (not a whole number, or outside [0, vocab)), RUN-OVERFLOW
    (CacheOverflow: a row does not fit its capacity).
    """
    if not hasattr(rows, "__len__"):
        raise InputError(
            "RUN-BATCH",
            f"found {quoted(type(rows).__name__)}, wanted a list of rows of token ids",
            hint="prefill([[5, 8, 2], [7, 1]]) appends three tokens to row 0 and two to row 1",
        )
    if len(rows) != len(lengths_B):
        raise InputError(
            "RUN-BATCH",
            f"found {len(rows)} rows, wanted {len(lengths_B)}, the runner's batch",
            hint="open_runner(..., batch=N) sets the number of rows",
            rows=len(rows),
            batch=len(lengths_B),
        )
    found = tuple(
        np.empty(0, np.int64) if row is None else _checked_tokens(row, index, vocab_size)
        for index, row in enumerate(rows)
    )
    if not any(map(len, found)):
        raise InputError(
            "RUN-EMPTY",
            f"all {len(found)} rows are idle, wanted tokens in at least one",
            hint="None leaves a row as it is; a call needs a row that is not None",
        )
    for index, tokens in enumerate(found):
        _check_room(index, int(lengths_B[index]), len(tokens), capacity)
    return found


def checked_step(
    tokens: Sequence[int | None], lengths_B: NDArray[np.int64], capacity: int, vocab_size: int
) -> Rows:
    """One token per row, or None, as rows of one. Raises as `checked_rows`."""
    if not hasattr(tokens, "__len__"):
        raise InputError(
            "RUN-BATCH",
            f"found {quoted(type(tokens).__name__)}, wanted a list of one token id per row",
            hint="decode([4, 9]) appends token 4 to row 0 and token 9 to row 1",
        )
    rows = [None if token is None else [token] for token in tokens]
    return checked_rows(rows, lengths_B, capacity, vocab_size)


def checked_places(rows: Sequence[int] | None, batch: int) -> list[int]:
    """Indices of rows; None is all of them. Raises: InputError RUN-ROW."""
    if rows is None:
        return list(range(batch))
    for row in rows:
        if isinstance(row, bool) or not isinstance(row, (int, np.integer)) or not 0 <= row < batch:
            raise InputError(
                "RUN-ROW",
                f"found row {quoted(row)}, wanted one of 0 to {batch - 1}",
                hint="reset([0]) forgets the first row, reset() all of them",
                batch=batch,
            )
    return [int(row) for row in rows]


def checked_rollback(
    lengths: Sequence[int] | NDArray[np.int64],
    least_B: NDArray[np.int64],
    most_B: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Lengths to go back to, of row b from `least_B[b]` to `most_B[b]`.

    Raises: InputError RUN-ROLLBACK.
    """
    try:
        found_B = np.asarray(lengths)
    except (ValueError, OverflowError):
        found_B = np.empty(0)
    fits = found_B.shape == most_B.shape and found_B.dtype.kind in "iu"
    if not fits or (found_B < least_B).any() or (found_B > most_B).any():
        raise InputError(
            "RUN-ROLLBACK",
            f"cannot go back to lengths {quoted(lengths)}, wanted {least_B.tolist()} to "
            f"{most_B.tolist()}",
            hint="one length per row; a ring or a state goes back over the last verify() only",
            least=least_B.tolist(),
            most=most_B.tolist(),
        )
    return found_B.astype(np.int64)


def checked_sizes(batch: int, capacity: int, chunk: int) -> None:
    """Raises: InputError RUN-BATCH, RUN-CAPACITY, RUN-CHUNK for a size below one."""
    for name, code, value in (
        ("batch", "RUN-BATCH", batch),
        ("capacity", "RUN-CAPACITY", capacity),
        ("chunk", "RUN-CHUNK", chunk),
    ):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise InputError(code, f"{name} is {quoted(value)}, wanted a whole number from 1")


def checked_padding(lengths_B: NDArray[np.int64], new_tokens: int, capacity: int) -> None:
    """For graphs that write padding: every row, idle ones too, has room for the widest.

    Raises: InputError RUN-OVERFLOW.
    """
    for row, length in enumerate(lengths_B):
        _check_room(row, int(length), new_tokens, capacity)


def _checked_tokens(row: Sequence[int], index: int, vocab_size: int) -> NDArray[np.int64]:
    try:
        tokens = np.asarray(row)
    except (ValueError, OverflowError):
        tokens = np.empty((0, 0))
    if tokens.ndim == 1 and tokens.size == 0:
        raise InputError(
            "RUN-EMPTY",
            f"row {index} has no tokens, wanted at least one",
            hint="start an empty text with the model's begin-of-sequence token",
            row=index,
        )
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise InputError(
            "RUN-TOKEN",
            f"row {index} is {quoted(row)}, wanted a flat list of whole numbers",
            hint="token ids come from the tokenizer: tokenizer.encode(text).ids",
            row=index,
        )
    outside = (tokens < 0) | (tokens >= vocab_size)
    if outside.any():
        place = int(outside.argmax())
        raise InputError(
            "RUN-TOKEN",
            f"token {int(tokens[place])} at place {place} of row {index} is outside "
            f"[0, {vocab_size})",
            hint="the tokenizer belongs to another model, or the ids were shifted",
            row=index,
            place=place,
        )
    return tokens.astype(np.int64)


def _check_room(row: int, length: int, new: int, capacity: int) -> None:
    if length + new > capacity:
        raise InputError(
            "RUN-OVERFLOW",
            f"CacheOverflow: row {row} holds {length} tokens and {new} more do not fit its "
            f"capacity of {capacity}",
            hint="open the runner with a larger capacity, or reset() it",
            row=row,
            length=length,
            new_tokens=new,
            capacity=capacity,
        )
