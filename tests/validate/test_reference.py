"""The source asked row by row: short calls of a small model on one thread, long ones on all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from mla_deploy.validate.reference import Reference


class Counting:
    """A source that tells on how many threads each call ran."""

    cache_layers = ()

    def __init__(self) -> None:
        self.threads: list[tuple[int, int]] = []

    def reset(self) -> None:
        pass

    def prefill(self, rows: Sequence[Sequence[int]]) -> Any:
        self.threads.append((len(rows[0]), torch.get_num_threads()))
        return np.zeros((1, 4), np.float32)


@pytest.mark.parametrize(("short", "wanted"), [(8, [(17, 2), (1, 1)]), (0, [(17, 2), (1, 2)])])
def test_short_calls_run_on_one_thread_where_asked(
    short: int, wanted: list[tuple[int, int]]
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        source: Any = Counting()
        Reference(source, short_tokens=short).row((tuple(range(17)), (5,)))
        assert source.threads == wanted
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
