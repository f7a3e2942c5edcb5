"""What is run: sequences of calls that a right graph survives and a wrong one does not.

Position 0 hides a wrong softmax scale, a short prompt hides a wrong YaRN ramp, one call hides a
wrong cache, equal rows hide a wrong mask: so there are long prompts, every split, many decode
steps and ragged batches. Token ids are random but fixed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeGuard

import numpy as np

from mla_deploy.errors import InputError
from mla_deploy.shapes import MOST_VERIFIED

Tokens = tuple[int, ...]
Form = Literal["auto", "absorbed", "expanded"]

_SEED = 20260101
_SHORT = 17
_DECODE_STEPS = 64
# Prompts past the original length of YaRN and its like, where that can be run in minutes.
_LONGEST_ORIGINAL = 4096
_PAST_ORIGINAL = 13
_LONG = 300
_SMALL_CHUNK = 5


class ModelFacts(Protocol):
    """What the cases go by; a config, or what a manifest says of one."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def rope_original_length(self) -> int | None: ...


@dataclass(frozen=True)
class Call:
    """One call of a runner: `rows[b]` is appended to row b."""

    rows: tuple[Tokens, ...]
    is_decode: bool = False


@dataclass(frozen=True)
class Case:
    """Calls on one runner. `form` forces a graph; `chunk` makes the runner split prompts.

    `checked` decode calls in a row are made as one, by `verify()`; wrong tokens are taken back.
    Raises on construction: InputError VAL-CASE.
    """

    name: str
    calls: tuple[Call, ...]
    form: Form = "auto"
    chunk: int = 512
    checked: int = 1

    def __post_init__(self) -> None:
        sizes = {len(call.rows) for call in self.calls}
        steps = [row for call in self.calls if call.is_decode for row in call.rows]
        if len(sizes) != 1 or any(len(row) != 1 for row in steps) or 0 in sizes:
            raise InputError(
                "VAL-CASE",
                f"case {self.name} has calls of {sorted(sizes)} rows",
                hint="every call needs the same number of rows, a decode call one token per row",
            )

    @property
    def batch(self) -> int:
        return len(self.calls[0].rows)

    @property
    def longest(self) -> int:
        """Tokens in the longest row after all calls."""
        return max(sum(map(len, segments)) for segments in self.rows())

    def rows(self) -> tuple[tuple[Tokens, ...], ...]:
        """Per row of the batch: the tokens of each call."""
        return tuple(zip(*(call.rows for call in self.calls), strict=True))


def default_cases(config: ModelFacts) -> tuple[Case, ...]:
    """The cases that every bundle must pass, cut to the positions that the model has."""
    longest = config.max_position_embeddings
    tokens = _Tokens(config.vocab_size)
    cases = [
        *_prefill_cases(tokens, _long_length(config)),
        *_split_cases(tokens),
        *_decode_cases(tokens, config.rope_original_length),
        *_batch_cases(tokens, config.rope_original_length),
    ]
    return tuple(case for case in cases if case.longest <= longest)


def verify_case(config: ModelFacts) -> tuple[Case, ...]:
    """Several new tokens a row in one pass, of ragged rows; none where the model has no room."""
    tokens = _Tokens(config.vocab_size)
    prompts = [tokens.row(index, length) for index, length in enumerate((_SHORT, 5, 1))]
    more = [tokens.row(index + 3, 3 * MOST_VERIFIED - 1) for index in range(3)]
    steps = (_decode(*((token,) for token in step)) for step in zip(*more, strict=True))
    case = Case("verify-3", (_prefill(*prompts), *steps), checked=MOST_VERIFIED)
    return (case,) if case.longest <= config.max_position_embeddings else ()


def continued_case(name: str, prompt: Sequence[int], more: Sequence[int]) -> Case:
    """A prompt, then given tokens one by one."""
    return Case(name, (_prefill(tuple(prompt)), *(_decode((token,)) for token in more)))


def _prefill_cases(tokens: _Tokens, long_length: int) -> Iterator[Case]:
    for length in (1, 2, _SHORT):
        yield Case(f"prefill-{length}", (_prefill(tokens.first(length)),))
    for form in ("absorbed", "expanded"):
        yield Case(f"prefill-{_SHORT}-{form}", (_prefill(tokens.first(_SHORT)),), form)
        yield Case(f"prefill-{long_length}-{form}", (_prefill(tokens.first(long_length)),), form)


def _split_cases(tokens: _Tokens) -> Iterator[Case]:
    prompt = tokens.first(_SHORT)
    for split in range(1, _SHORT):
        calls = (_prefill(prompt[:split]), _prefill(prompt[split:]))
        yield Case(f"split-{_SHORT}-at-{split}", calls)
    for form in ("absorbed", "expanded"):
        calls = (_prefill(prompt), _prefill(tokens.other(2 * _SMALL_CHUNK + 1)))
        yield Case(f"chunks-of-{_SMALL_CHUNK}-{form}", calls, form, _SMALL_CHUNK)


def _decode_cases(tokens: _Tokens, original: int | None) -> Iterator[Case]:
    more = tokens.other(_DECODE_STEPS)
    yield continued_case(f"decode-{_DECODE_STEPS}", tokens.first(_SHORT), more)
    if _is_crossed(original):
        prompt = tokens.first(original - _PAST_ORIGINAL)
        yield continued_case(f"decode-across-{original}", prompt, more[: 2 * _PAST_ORIGINAL])


def _batch_cases(tokens: _Tokens, original: int | None) -> Iterator[Case]:
    """Rows of unequal length, in two orders, in small chunks, each alone, and one going far."""
    rows = _ragged_rows(tokens)
    for name, order in (("ragged-3", (0, 1, 2)), ("ragged-3-permuted", (2, 0, 1))):
        yield _ragged_case(name, tuple(rows[index] for index in order))
    yield _ragged_case("ragged-3-chunked", rows, _SMALL_CHUNK)
    for index, row in enumerate(rows):
        yield _ragged_case(f"ragged-3-row-{index}-alone", (row,))
    if _is_crossed(original):
        lengths = (5, original - _PAST_ORIGINAL, 1)
        prompts = [tokens.row(index, length) for index, length in enumerate(lengths)]
        more = [tokens.row(index + 3, 2 * _PAST_ORIGINAL) for index in range(3)]
        steps = (_decode(*((token,) for token in step)) for step in zip(*more, strict=True))
        yield Case(f"ragged-3-across-{original}", (_prefill(*prompts), *steps))


def _ragged_case(name: str, rows: tuple[tuple[Tokens, ...], ...], chunk: int = 512) -> Case:
    calls = tuple(
        Call(parts, is_decode=all(len(part) == 1 for part in parts))
        for parts in zip(*rows, strict=True)
    )
    return Case(name, calls, chunk=chunk)


def _ragged_rows(tokens: _Tokens) -> tuple[tuple[Tokens, ...], ...]:
    """Three rows: prompts of 17, 5 and 1, eight steps, prompts again, four steps."""
    prompts = ((_SHORT, 3), (5, 11), (1, 1))
    rows = []
    for index, (first, second) in enumerate(prompts):
        own = tokens.row(index, first + second + 12)
        head, middle = own[:first], own[first : first + second]
        steps = [(token,) for token in own[first + second :]]
        rows.append((head, *steps[:8], middle, *steps[8:]))
    return tuple(rows)


def _is_crossed(original: int | None) -> TypeGuard[int]:
    """Whether the rope changes at a length that the cases can reach."""
    return original is not None and _PAST_ORIGINAL < original <= _LONGEST_ORIGINAL


def _long_length(config: ModelFacts) -> int:
    original = config.rope_original_length
    wanted = original + _PAST_ORIGINAL if _is_crossed(original) else _LONG
    return min(wanted, config.max_position_embeddings)


@dataclass(frozen=True)
class _Tokens:
    """Fixed random token ids."""

    vocab_size: int

    def first(self, count: int) -> Tokens:
        return self.row(100, count)

    def other(self, count: int) -> Tokens:
        return self.row(101, count)

    def row(self, stream: int, count: int) -> Tokens:
        generator = np.random.default_rng((_SEED, stream))
        return tuple(int(token) for token in generator.integers(0, self.vocab_size, count))


def _prefill(*rows: Tokens) -> Call:
    return Call(rows)


def _decode(*rows: Tokens) -> Call:
    return Call(rows, is_decode=True)
