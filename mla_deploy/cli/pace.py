"""Tokens a second of one generation: prefill up to the first token, decode from there on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from time import perf_counter


class Pace:
    """Times the tokens that pass through `timed`; what the caller does with one is not counted."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.new_tokens = 0
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0

    def timed(self, tokens: Iterable[int]) -> Iterator[int]:
        steps = iter(tokens)
        while True:
            started = perf_counter()
            token = next(steps, None)
            seconds = perf_counter() - started
            if token is None:
                return
            if self.new_tokens == 0:
                self.prefill_seconds = seconds
            else:
                self.decode_seconds += seconds
            self.new_tokens += 1
            yield token

    def to_dict(self) -> dict[str, float]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "prefill_tokens_per_second": _rate(self.prompt_tokens, self.prefill_seconds),
            "decode_tokens_per_second": _rate(self.new_tokens - 1, self.decode_seconds),
        }

    def __str__(self) -> str:
        facts = self.to_dict()
        return (
            f"{self.prompt_tokens} prompt tokens at {facts['prefill_tokens_per_second']:.0f}/s, "
            f"{self.new_tokens} new at {facts['decode_tokens_per_second']:.0f}/s"
        )


def _rate(count: int, seconds: float) -> float:
    """Zero when nothing was timed."""
    return round(count / seconds, 1) if count > 0 and seconds > 0 else 0.0
