"""Greedy generation in fewer passes: tokens are drafted from the text so far, and checked together.

    draft    the longest n-gram that ends the text and stood in it before: what followed it then
    check    one pass of the decode graph over the last token and the draft: `Verifier.verify`
             costs about two passes of one token, however many are drafted
    accept   drafted tokens as long as each is the most likely one, and the one that comes after

The tokens are those of `generate`, up to logits so close that rounding decides: a pass of several
tokens adds in another order than a pass of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mla_deploy.errors import InputError, quoted
from mla_deploy.runtime.generation import checked_generation
from mla_deploy.runtime.protocol import Runner, Verifier

# A pass over a draft costs about two of one token: n-grams of a size whose drafts brought less than
# one token each of late are left alone for a while.
_HOPE, _WORTH, _MEMORY, _PARDON = 2.0, 1.0, 0.8, 0.05
_LONGEST, _SHORTEST = 4, 2  # n-grams; one token alone repeats too often to tell what follows


@dataclass
class Gain:
    """What speculation has brought so far; counted while the tokens come."""

    passes: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def tokens_per_pass(self) -> float:
        """1 where nothing was accepted; the pass over the prompt is not counted."""
        return self.tokens / self.passes if self.passes else 0.0

    @property
    def accepted_share(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0

    def to_dict(self) -> dict[str, float]:
        return {
            "passes": self.passes,
            "drafted_tokens": self.drafted,
            "accepted_tokens": self.accepted,
            "tokens_per_pass": round(self.tokens_per_pass, 3),
            "accepted_share": round(self.accepted_share, 3),
        }

    def __str__(self) -> str:
        return (
            f"{self.tokens_per_pass:.2f} tokens a pass, {self.accepted_share:.0%} of "
            f"{self.drafted} drafted ones accepted"
        )


def speculate(
    runner: Runner,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    *,
    draft: int | None = None,
    gain: Gain | None = None,
) -> Iterator[int]:
    """The tokens of `generate`, in fewer passes where the text repeats; `gain` is kept up to date.

    At most `draft` tokens are checked ahead, 1 to 7; None is 7. Rejected ones are taken back before
    the accepted ones are handed out.
    Raises, before anything runs: as `generate`; InputError RUN-VERIFY (a runner that does not check
    several tokens in one pass), RUN-DRAFT.
    """
    if not isinstance(runner, Verifier) or runner.most_verified < 2:
        raise InputError(
            "RUN-VERIFY",
            f"{type(runner).__name__} does not check several new tokens in one pass here",
            hint="engines do not; a bundle of an older release has to be exported again",
        )
    most = runner.most_verified - 1
    draft = most if draft is None else draft
    if isinstance(draft, bool) or not isinstance(draft, int) or not 1 <= draft <= most:
        raise InputError(
            "RUN-DRAFT",
            f"draft is {quoted(draft)}, wanted 1 to {most} tokens",
            hint="leave it out for all that one pass checks",
        )
    checked_generation(runner, prompt_ids, max_new_tokens)
    found = Gain() if gain is None else gain
    return _tokens(runner, prompt_ids, max_new_tokens, frozenset(eos_ids), (draft, found))


class PromptLookup:
    """What followed the last tokens when they stood in the text before."""

    def __init__(self) -> None:
        self._text: list[int] = []
        self._worth = dict.fromkeys(range(_SHORTEST, _LONGEST + 1), _HOPE)  # by size of n-gram
        self._size = _LONGEST  # of the last draft
        # n-gram -> the place behind its last occurrence but the one that ends the text
        self._places: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            for size in range(_SHORTEST, _LONGEST + 1):
                if len(self._text) >= size:
                    self._places[tuple(self._text[-size:])] = len(self._text)
            self._text.append(token)

    def draft(self, most: int) -> list[int]:
        """Up to `most` tokens; none when no n-gram at the end was seen before, or it is no use."""
        for size in range(_LONGEST, _SHORTEST - 1, -1):
            place = self._places.get(tuple(self._text[-size:]))
            if place is not None:
                self._size = size
                if self._worth[size] >= _WORTH:
                    return self._text[place : place + most]
                self._worth[size] += _PARDON
                return []
        return []

    def learn(self, accepted: int) -> None:
        """How many tokens of the last draft were right."""
        self._worth[self._size] = _MEMORY * self._worth[self._size] + (1 - _MEMORY) * accepted


def _tokens(
    runner: Verifier,
    prompt_ids: Sequence[int],
    left: int,
    eos_ids: frozenset[int],
    how: tuple[int, Gain],
) -> Iterator[int]:
    draft, gain = how
    text = PromptLookup()
    text.extend(prompt_ids)
    new = [int(runner.prefill([prompt_ids])[0].argmax())]
    while True:
        for token in new:
            if token in eos_ids:
                return
            left -= 1
            yield token
        if not left:
            return
        text.extend(new)
        drafted = text.draft(min(draft, left - 1)) if left > 1 else []
        new = _checked(runner, [new[-1], *drafted], eos_ids)
        if drafted:
            text.learn(len(new) - 1)
        gain.passes += 1
        gain.tokens += len(new)
        gain.drafted += len(drafted)
        gain.accepted += len(new) - 1


def _checked(runner: Verifier, tokens: list[int], eos_ids: frozenset[int]) -> list[int]:
    """Drafted tokens that are right, and the one after them; the others are taken back.

    Ends with an end token where one is right: what stands behind it was not asked for.
    """
    if len(tokens) == 1:
        return [int(runner.decode(tokens)[0].argmax())]
    start = int(runner.lengths[0])
    best = [int(token) for token in runner.verify([tokens])[0].argmax(axis=-1)]
    right = 0
    for drafted, wanted in zip(tokens[1:], best, strict=False):
        if drafted != wanted or wanted in eos_ids:
            break
        right += 1
    if right < len(tokens) - 1:
        runner.rollback([start + 1 + right])
    return best[: right + 1]
