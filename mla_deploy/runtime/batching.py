"""Several texts at once: requests wait for a row, rows are filled again as their texts end.

    batcher = Batcher(runner)
    for ids in prompts:
        batcher.submit(ids, max_new_tokens=100)
    for number, token in batcher.run():
        ...

Each round, rows whose prompt is not cached yet take a piece of it, then every row past its prompt
takes one token: a long prompt delays the others by a piece, not by all of it. A text is greedy and
what it would be alone, up to logits so close that rounding decides.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mla_deploy.errors import InputError
from mla_deploy.runtime.generation import checked_count
from mla_deploy.runtime.guards import checked_rows
from mla_deploy.runtime.protocol import Runner

_PIECE = 256


@dataclass
class _Text:
    """One request on its way: prompt tokens that are not cached yet, tokens that may still come."""

    number: int
    prompt: list[int]
    left: int
    eos_ids: frozenset[int]
    last: int = -1


class Batcher:
    """Greedy generation over the rows of one runner, which nobody else may use meanwhile."""

    def __init__(self, runner: Runner, *, piece: int = _PIECE) -> None:
        """`piece`: prompt tokens that a row takes a round. Resets the runner.

        Raises: InputError RUN-CHUNK.
        """
        if piece < 1:
            raise InputError("RUN-CHUNK", f"piece is {piece}, wanted at least 1 token")
        self._runner, self._piece = runner, piece
        self._waiting: deque[_Text] = deque()
        self._rows: list[_Text | None] = [None] * runner.batch
        self._submitted = 0
        runner.reset()

    @property
    def waiting(self) -> int:
        """Requests without a row."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Rows that hold a text."""
        return sum(text is not None for text in self._rows)

    def submit(
        self, prompt_ids: Sequence[int], max_new_tokens: int, eos_ids: Sequence[int] = ()
    ) -> int:
        """Queue a request; its number, from 0. Also while others run.

        Raises: InputError RUN-COUNT, RUN-OVERFLOW, RUN-EMPTY, RUN-TOKEN, as `generate`.
        """
        runner = self._runner
        nothing_B = np.zeros(1, np.int64)
        (prompt,) = checked_rows([prompt_ids], nothing_B, runner.capacity, runner.vocab_size)
        checked_count(runner.capacity, 0, len(prompt), max_new_tokens)
        number, self._submitted = self._submitted, self._submitted + 1
        ends = frozenset(eos_ids)
        self._waiting.append(_Text(number, prompt.tolist(), max_new_tokens, ends))
        return number

    def run(self) -> Iterator[tuple[int, int]]:
        """(request, token) as they come, until no request is left."""
        while self._waiting or self.running:
            yield from self.round()

    def round(self) -> list[tuple[int, int]]:
        """(request, token) of one round; a free row takes the next request first.

        When a call fails, as `Runner.prefill`, the texts stand as they stood before it.
        """
        for row, text in enumerate(self._rows):
            if text is None and self._waiting:
                self._rows[row] = self._waiting.popleft()
        return self._begin() + self._go_on()

    def _begin(self) -> list[tuple[int, int]]:
        """A piece of each prompt that is not cached yet; first tokens where it was the last one."""
        pieces = [text.prompt[: self._piece] if text else None for text in self._rows]
        if not any(pieces):
            return []
        logits_BV = self._runner.prefill([piece or None for piece in pieces])
        ended = []
        for row, text in enumerate(self._rows):
            if text is not None and text.prompt:
                del text.prompt[: self._piece]
                if not text.prompt:
                    ended.append(row)
        return self._taken(ended, logits_BV)

    def _go_on(self) -> list[tuple[int, int]]:
        """One token more of each text that is past its prompt."""
        last = [None if text is None or text.prompt else text.last for text in self._rows]
        going = [row for row, token in enumerate(last) if token is not None]
        return self._taken(going, self._runner.decode(last)) if going else []

    def _taken(self, rows: list[int], logits_BV: NDArray[np.float32]) -> list[tuple[int, int]]:
        found = []
        for row in rows:
            text = self._rows[row]
            if text is None:
                continue
            token = int(logits_BV[row].argmax())
            if token not in text.eos_ids:
                text.last, text.left = token, text.left - 1
                found.append((text.number, token))
            if token in text.eos_ids or not text.left:
                self._rows[row] = None
                self._runner.reset([row])
        return found
