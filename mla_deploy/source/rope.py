"""Rotary frequencies, read from transformers' own rotary module so that no rope type is re-derived.

cos/sin of a position p are cos(p * inv_freq) * scaling and sin(p * inv_freq) * scaling, in fp32.
`longrope` has two frequency sets; a row takes the long one when its length after the call is beyond
the original length, as the source does for a batch of one. Every other supported type has one set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


@dataclass(frozen=True)
class RopeTable:
    """Frequencies of one rotary module; R is the rotary width."""

    inv_freq_F: torch.Tensor  # [R/2] fp32
    long_inv_freq_F: torch.Tensor | None  # [R/2] fp32, longrope only
    original_length: int  # the length at which longrope switches; 0 when there is one set
    scaling: float  # YaRN's and longrope's factor on cos and sin
    is_complex: bool  # the source multiplies complex numbers (interleaved in, interleaved out)


def rope_table(rotary: nn.Module) -> RopeTable:
    """Read the table of `rotary`, which may itself be empty: it is rebuilt on the CPU."""
    build: Any = type(rotary)
    real: Any = build(config=rotary.config)
    parameters = real.config.rope_parameters
    long_inv_freq_F = None
    original = 0
    if parameters["rope_type"] == "longrope":
        original = int(parameters["original_max_position_embeddings"])
        long_inv_freq_F, _ = ROPE_INIT_FUNCTIONS["longrope"](real.config, seq_len=original + 1)
    probe = real(torch.zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.int64))
    return RopeTable(
        inv_freq_F=real.original_inv_freq.float(),
        long_inv_freq_F=None if long_inv_freq_F is None else long_inv_freq_F.float(),
        original_length=original,
        scaling=float(real.attention_scaling),
        is_complex=torch.is_tensor(probe) and probe.is_complex(),
    )


def position_embeddings(
    positions_BS: torch.Tensor,
    lengths_B: torch.Tensor,
    inv_freqs: tuple[torch.Tensor, ...],
    table: RopeTable,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos_BSF and sin_BSF, one per pair; `lengths_B` are the rows' lengths after the call."""
    inv_freq = inv_freqs[0]
    if table.original_length:
        is_long_B11 = lengths_B[:, None, None] > table.original_length
        inv_freq = torch.where(is_long_B11, inv_freqs[1], inv_freqs[0])
    angles_BSF = positions_BS[..., None].float() * inv_freq
    return angles_BSF.cos() * table.scaling, angles_BSF.sin() * table.scaling
