"""What the worker asks of a contender.

A contender holds one row of tokens. `fill` makes it hold `context - 1` of them, `step` appends one
more, `rewind` takes that one away again, so that every step does the same work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Contender(Protocol):
    """One model, loaded."""

    def facts(self) -> dict[str, Any]:
        """Versions of what runs it, and what a reader should know of how it runs."""
        ...

    def fill(self, context: int) -> int:
        """Hold `context - 1` cached tokens; bytes of the cache that a step then works on."""
        ...

    def step(self) -> None:
        """Append one token: what is timed."""
        ...

    def rewind(self) -> None:
        """Take the last step back; not timed."""
        ...

    def prefill(self, tokens: int) -> None:
        """Read so many tokens from an empty cache: what is timed."""
        ...

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits of the last of `ids`, read from an empty cache: fp32 [vocab]."""
        ...


class CannotPrefill(Exception):
    """A contender that only decodes; the table shows a dash."""
