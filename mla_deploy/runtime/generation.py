"""Greedy generation over any runner, one token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mla_deploy.errors import InputError
from mla_deploy.runtime.protocol import Runner


def generate(
    runner: Runner,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
) -> Iterator[int]:
    """The most likely token after the prompt, then after that, as an iterator.

    Ends before a token of `eos_ids`, or after `max_new_tokens`. The prompt is appended to what
    the runner holds. The last token is handed out without being cached, so the row needs room for
    len(prompt) + max_new_tokens - 1.
    Raises, before anything runs: InputError RUN-BATCH (more than one row), RUN-COUNT,
    RUN-OVERFLOW; while it runs, as `Runner.prefill`.
    """
    checked_generation(runner, prompt_ids, max_new_tokens)
    return _tokens(runner, prompt_ids, max_new_tokens, frozenset(eos_ids))


def checked_generation(runner: Runner, prompt_ids: Sequence[int], max_new_tokens: int) -> None:
    """Raises: InputError RUN-BATCH, RUN-COUNT, RUN-OVERFLOW, as `generate`."""
    if runner.batch != 1:
        raise InputError(
            "RUN-BATCH",
            f"generate() follows one row, this runner has {runner.batch}",
            hint="open a runner with batch=1, or call prefill() and decode() yourself",
        )
    checked_count(runner.capacity, int(runner.lengths[0]), len(prompt_ids), max_new_tokens)


def checked_count(capacity: int, held: int, prompt_tokens: int, max_new_tokens: int) -> None:
    """Room for all but the last token, which is not cached.

    Raises: InputError RUN-COUNT, RUN-OVERFLOW.
    """
    if max_new_tokens < 1:
        raise InputError("RUN-COUNT", f"max_new_tokens is {max_new_tokens}, wanted at least 1")
    needed = held + prompt_tokens + max_new_tokens - 1
    if needed > capacity:
        raise InputError(
            "RUN-OVERFLOW",
            f"CacheOverflow: {held} cached, {prompt_tokens} prompt and {max_new_tokens} new "
            f"tokens need room for {needed}, the runner has {capacity}",
            hint="open the runner with a larger capacity, or ask for fewer new tokens",
            needed=needed,
            capacity=capacity,
        )


def _tokens(
    runner: Runner, prompt_ids: Sequence[int], max_new_tokens: int, eos_ids: frozenset[int]
) -> Iterator[int]:
    logits_BV = runner.prefill([prompt_ids])
    for left in reversed(range(max_new_tokens)):
        token = int(logits_BV[0].argmax())
        if token in eos_ids:
            return
        yield token
        if left:
            logits_BV = runner.decode([token])
