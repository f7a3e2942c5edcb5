"""The step plan: what the two length inputs imply for every layer, computed once for each call."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StepPlan:
    """What every layer of one call shares; computed once, from the two length inputs.

    T is the rows bound (capacity, or past plus new for a growing cache).
    """

    visible_B1ST: torch.Tensor  # bool: new token s of the row may see cached token t
    filled_B1T1: torch.Tensor  # bool: slot t holds a valid token after this call
    all_filled: torch.Tensor  # bool scalar: no slot of any row is stale
    active_B11: torch.Tensor  # bool: the row has a new token in this call
    source_BS1: torch.Tensor  # int64: which new token slot s writes (padding repeats the last)
    slot_BS3: torch.Tensor  # int64: (row, 0, slot) that new token s writes

    def operands(self) -> tuple[torch.Tensor, ...]:
        return (
            self.visible_B1ST,
            self.filled_B1T1,
            self.all_filled,
            self.active_B11,
            self.source_BS1,
            self.slot_BS3,
        )


def step_plan(
    steps_S: torch.Tensor, cache_lengths_B: torch.Tensor, new_lengths_B: torch.Tensor, rows: int
) -> StepPlan:
    """What the lengths imply: which slots are read, written, stale. See `StepPlan`."""
    slots_T = torch.arange(rows)
    total_B = cache_lengths_B + new_lengths_B
    filled_BT = slots_T < total_B[:, None]
    positions_BS = cache_lengths_B[:, None] + steps_S
    visible_BST = (slots_T <= positions_BS[..., None]) & filled_BT[:, None]
    # Padding repeats the row's last valid token, so that it never needs a slot of its own and two
    # writes to one slot carry the same bytes. An idle row rewrites what its slot already holds.
    source_BS = torch.minimum(steps_S, torch.clamp(new_lengths_B - 1, min=0)[:, None])
    active_B = new_lengths_B > 0
    written_BS = torch.clamp(
        cache_lengths_B[:, None] + torch.where(active_B[:, None], source_BS, -1), min=0
    )
    row_BS = torch.arange(cache_lengths_B.shape[0])[:, None].expand_as(written_BS)
    slot_BS3 = torch.stack((row_BS, torch.zeros_like(written_BS), written_BS), dim=-1)
    return StepPlan(
        visible_B1ST=visible_BST[:, None],
        filled_B1T1=filled_BT[:, None, :, None],
        all_filled=total_B.min() >= rows,
        active_B11=active_B[:, None, None],
        source_BS1=source_BS[..., None],
        slot_BS3=slot_BS3,
    )
