"""The step plan: what the two length inputs imply for every layer, computed once for each call."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class RingPlan:
    """What sliding layers of one window share. U = window + S: the ring, then the new tokens.

    Token p lives in slot p mod window, so a query sees the ring as it was before the call and the
    new tokens behind it; the ring is written afterwards.
    """

    ring_visible_B1SU: torch.Tensor  # bool: new token s sees what stands at u
    ring_filled_B1U1: torch.Tensor  # bool: u holds a valid token of the row
    ring_source_BS1: torch.Tensor  # int64: which u is written for new token s
    ring_slot_BS3: torch.Tensor  # int64: (row, 0, slot) that it is written to


@dataclass(frozen=True)
class StepPlan:
    """What every layer of one call shares; computed once, from the two length inputs.

    T is the rows bound (capacity, or past plus new for a growing cache).
    """

    visible_B1ST: torch.Tensor  # bool: new token s of the row may see cached token t
    filled_B1T1: torch.Tensor  # bool: slot t holds a valid token after this call
    all_visible: torch.Tensor  # bool scalar: every new token sees every slot, none is stale
    active_B11: torch.Tensor  # bool: the row has a new token in this call
    valid_BS: torch.Tensor  # bool: new token s is no padding
    new_lengths_B: torch.Tensor  # int64: new tokens of the row
    source_BS1: torch.Tensor  # int64: which new token slot s writes (padding repeats the last)
    slot_BS3: torch.Tensor  # int64: (row, 0, slot) that new token s writes

    def operands(self) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


STEP_OPERANDS = tuple(field.name for field in fields(StepPlan))
RING_OPERANDS = tuple(field.name for field in fields(RingPlan))


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
    return StepPlan(
        visible_B1ST=visible_BST[:, None],
        filled_B1T1=filled_BT[:, None, :, None],
        # The first new token sees the last slot, so there is one of it, and no row is shorter.
        all_visible=(total_B.min() >= rows) & (positions_BS[:, :1].min() >= rows - 1),
        active_B11=active_B[:, None, None],
        valid_BS=steps_S < new_lengths_B[:, None],
        new_lengths_B=new_lengths_B,
        source_BS1=source_BS[..., None],
        slot_BS3=_places(written_BS),
    )


def ring_plan(
    steps_S: torch.Tensor, cache_lengths_B: torch.Tensor, new_lengths_B: torch.Tensor, window: int
) -> RingPlan:
    """The same for layers that see the last `window` tokens. See `RingPlan`."""
    ring_W = torch.arange(window)
    last_B1 = cache_lengths_B[:, None] - 1
    # Slot w holds the last token before this call whose position is w modulo the window.
    held_BW = last_B1 - torch.remainder(last_B1 - ring_W, window)
    positions_BU = torch.cat((held_BW, cache_lengths_B[:, None] + steps_S), dim=1)
    total_B1 = (cache_lengths_B + new_lengths_B)[:, None]
    filled_BU = (positions_BU >= 0) & (positions_BU < total_B1)
    query_BS1 = (cache_lengths_B[:, None] + steps_S)[..., None]
    seen_BSU = (positions_BU[:, None] <= query_BS1) & (positions_BU[:, None] > query_BS1 - window)
    # Of tokens that share a slot the last one is written for all; padding repeats the last token,
    # an idle row rewrites what its slot already holds.
    newest_B1 = torch.clamp(new_lengths_B - 1, min=0)[:, None]
    source_BS = torch.minimum(steps_S, newest_B1)
    rounds_BS = torch.div(newest_B1 - source_BS, window, rounding_mode="floor")
    kept_BS = source_BS + window * rounds_BS
    slot_BS = torch.remainder(cache_lengths_B[:, None] + kept_BS, window)
    active_B1 = new_lengths_B[:, None] > 0
    return RingPlan(
        ring_visible_B1SU=(seen_BSU & filled_BU[:, None])[:, None],
        ring_filled_B1U1=filled_BU[:, None, :, None],
        ring_source_BS1=torch.where(active_B1, window + kept_BS, slot_BS)[..., None],
        ring_slot_BS3=_places(slot_BS),
    )


def _places(slot_BS: torch.Tensor) -> torch.Tensor:
    """(row, 0, slot) of every slot: what a scatter into [B, 1, M, W] takes."""
    row_BS = torch.arange(slot_BS.shape[0])[:, None].expand_as(slot_BS)
    return torch.stack((row_BS, torch.zeros_like(slot_BS), slot_BS), dim=-1)
