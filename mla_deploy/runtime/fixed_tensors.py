"""Rings and states of a cache: tensors whose size does not depend on how many tokens are cached."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_deploy.runtime.cache_spec import CacheSpec

Array = NDArray[Any]


class FixedTensors:
    """Rings and states: two of each, one that a step reads and one that it writes.

    A step that fails has changed nothing. `held` and `fresh` hold None for tensors of other kinds.
    """

    def __init__(self, spec: CacheSpec, batch: int) -> None:
        self._tensors, self._batch = spec.tensors, batch
        self.reset()

    def reset(self) -> None:
        self.held, self.fresh = self._empty(), self._empty()

    def accept(self) -> None:
        """What the step wrote is what the next one reads."""
        self.held, self.fresh = self.fresh, self.held

    def saved(self) -> tuple[Array | None, ...]:
        """A copy, to go back to when a call of several steps fails."""
        return tuple(None if array is None else array.copy() for array in self.held)

    def restore(self, saved: tuple[Array | None, ...]) -> None:
        self.held = saved

    def poison(self) -> None:
        """Fill the rings, of which nothing is valid yet; a state is zero before the first token."""
        for tensor, array in zip(self._tensors, self.held, strict=True):
            if array is not None and not tensor.is_state:
                array.view(np.uint8).fill(0xFF)

    @property
    def bytes(self) -> int:
        """Bytes of one of each; the second is scratch of a step."""
        return sum(array.nbytes for array in self.held if array is not None)

    def _empty(self) -> tuple[Array | None, ...]:
        return tuple(
            np.zeros(t.fixed_shape(self._batch), t.numpy_type) if t.is_fixed else None
            for t in self._tensors
        )
