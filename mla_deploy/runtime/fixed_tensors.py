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

    @property
    def is_empty(self) -> bool:
        """Every tensor has a row for each token."""
        return not any(tensor.is_fixed for tensor in self._tensors)

    def reset(self) -> None:
        self.held, self.fresh = self._empty(), self._empty()

    def reset_row(self, row: int) -> None:
        """A state is zero before the first token; of a ring no row is valid then."""
        for array in self.held:
            if array is not None:
                array[row] = 0

    def accept(self) -> None:
        """What the step wrote is what the next one reads."""
        self.held, self.fresh = self.fresh, self.held

    def accept_row(self, row: int) -> None:
        """The step wrote one row alone; the others stay as they are held."""
        for held, fresh in zip(self.held, self.fresh, strict=True):
            if held is not None and fresh is not None:
                held[row] = fresh[row]

    def saved(self) -> tuple[Array | None, ...]:
        """A copy, to go back to when a call of several steps fails."""
        return tuple(None if array is None else array.copy() for array in self.held)

    def restore(self, saved: tuple[Array | None, ...]) -> None:
        self.held = saved

    def taken_back(
        self,
        before_B: NDArray[np.int64],
        kept_B: NDArray[np.int64],
        after_B: NDArray[np.int64],
    ) -> tuple[tuple[Array | None, ...], NDArray[np.bool_]]:
        """`held` as it was before tokens `kept_B` to `after_B` of the last step, as a copy.

        A ring gets back the rows that these overwrote. A state, or a ring shorter than the step,
        goes back to before the step: the second result tells which rows have to run again what
        they keep of it.
        """
        found = self.saved()
        widest = int((after_B - before_B).max())
        in_slots = all(t.rows is not None and t.rows >= widest for t in self._tensors if t.is_fixed)
        for row in np.flatnonzero(kept_B < after_B):
            positions = np.arange(kept_B[row], after_B[row])
            for tensor, array, old in zip(self._tensors, found, self.fresh, strict=True):
                if array is None or old is None:
                    continue
                if in_slots:
                    slots = positions % (tensor.rows or 1)
                    array[row, 0, slots] = old[row, 0, slots]
                else:
                    array[row] = old[row]
        again_B = (kept_B > before_B) & (kept_B < after_B)
        return found, np.zeros_like(again_B) if in_slots else again_B

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
