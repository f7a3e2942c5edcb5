"""The step plan in words: which slots a call reads, writes, leaves; row by row in plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mla_deploy.source.plan import ring_plan, step_plan
from tests.rewrite.graphs import plan

# cached, new, new tokens of the call, rows bound
CASES = [
    ([0], [1], 1, 1),
    ([0], [5], 5, 8),
    ([3, 4, 2], [1, 2, 0], 2, 8),
    ([7, 0, 0], [1, 4, 0], 4, 8),
    ([0, 0], [0, 0], 3, 4),
    ([4, 4], [4, 4], 4, 8),  # full
]


@pytest.mark.parametrize(("cached", "new", "width", "rows"), CASES)
def test_against_loops(cached: list[int], new: list[int], width: int, rows: int) -> None:
    made = step_plan(torch.arange(width), torch.tensor(cached), torch.tensor(new), rows)
    wanted = plan(cached, new, width, rows)
    wanted["valid"] = np.arange(width) < np.array(new)[:, None]
    wanted["new_lengths"] = np.array(new)
    for field, value in vars(made).items():
        name, found = field.rpartition("_")[0] if field != "all_visible" else field, value.numpy()
        if name == "visible":
            # What padding sees is nobody's business: its rows of the result are never read.
            valid = np.arange(width) < np.array(new)[:, None]
            found, known = found[:, 0][valid], wanted[name][:, 0][valid]
        else:
            known = wanted[name]
        np.testing.assert_array_equal(found, known, err_msg=name)
        assert found.dtype == known.dtype


@pytest.mark.parametrize(("cached", "new", "width", "rows"), CASES)
def test_invariants(cached: list[int], new: list[int], width: int, rows: int) -> None:
    """No slot out of range, none visible that is not filled, every new slot written once."""
    made = step_plan(torch.arange(width), torch.tensor(cached), torch.tensor(new), rows)
    visible = made.visible_B1ST[:, 0].numpy()
    filled = made.filled_B1T1[:, 0, :, 0].numpy()
    assert not (visible & ~filled[:, None]).any()
    slots = made.slot_BS3.numpy()
    assert (slots >= 0).all() and (slots[..., 2] < rows).all()
    for row, (past, count) in enumerate(zip(cached, new, strict=True)):
        assert (slots[row, :, 0] == row).all() and (slots[row, :, 1] == 0).all()
        if count:
            assert set(slots[row, :, 2]) == set(range(past, past + count))
            assert [v.sum() for v in visible[row, :count]] == list(
                range(past + 1, past + count + 1)
            )


@pytest.mark.parametrize(("cached", "new", "width", "rows"), CASES)
@pytest.mark.parametrize("window", [1, 2, 3, 5, 8])
def test_a_ring_against_the_whole_history(
    cached: list[int], new: list[int], width: int, rows: int, window: int
) -> None:
    """What a query sees through the ring is the last `window` tokens, and so is what is kept."""
    made = ring_plan(torch.arange(width), torch.tensor(cached), torch.tensor(new), window)
    for row, (past, count) in enumerate(zip(cached, new, strict=True)):
        ring = [-1] * window
        for token in range(past):
            ring[token % window] = token
        every = ring + [past + s if s < count else -1 for s in range(width)]
        filled = made.ring_filled_B1U1[row, 0, :, 0].tolist()
        assert filled == [token >= 0 for token in every]
        for s in range(count):
            seen = made.ring_visible_B1SU[row, 0, s].tolist()
            tokens = {token for token, is_seen in zip(every, seen, strict=True) if is_seen}
            assert tokens == set(range(max(0, past + s - window + 1), past + s + 1))
        places = made.ring_slot_BS3[row]
        assert set(places[:, 0].tolist()) == {row} and set(places[:, 1].tolist()) == {0}
        sources = made.ring_source_BS1[row, :, 0].tolist()
        for slot, source in zip(places[:, 2].tolist(), sources, strict=True):
            ring[slot] = every[source]
        total = past + count
        kept = {token for token in ring if token >= 0}
        assert kept == set(range(max(0, total - window), total))
