"""Rotary frequencies, read from transformers' own rotary module so that no rope type is re-derived.

cos/sin of a position p are cos(p * inv_freq) * scaling and sin(p * inv_freq) * scaling, in fp32.
`longrope` has two frequency sets; a row takes the long one when its length after the call is beyond
the original length, as the source does for a batch of one. Every other supported type has one set.
A model may have one table for each layer type, and learned factors e^alpha on the frequencies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mla_deploy.errors import InputError

# What a rotary module may learn: alpha [R/2], frequencies are multiplied by e^alpha.
_LEARNED = "alpha"


@dataclass(frozen=True)
class RopeTable:
    """Frequencies of one rotary module and layer type; R is the rotary width."""

    inv_freq_F: torch.Tensor  # [R/2] fp32
    long_inv_freq_F: torch.Tensor | None  # [R/2] fp32, longrope only
    original_length: int  # the length at which longrope switches; 0 when there is one set
    scaling: float  # YaRN's and longrope's factor on cos and sin
    is_complex: bool  # the source multiplies complex numbers (interleaved in, interleaved out)

    @property
    def sets(self) -> tuple[torch.Tensor, ...]:
        """The frequency sets: one, or the short and the long one."""
        return tuple(t for t in (self.inv_freq_F, self.long_inv_freq_F) if t is not None)


# By layer type; the one key "" where all layers share a table.
RopeTables = Mapping[str, RopeTable]


def rope_tables(rotary: nn.Module | None) -> RopeTables:
    """Read the tables of `rotary`, which may itself be empty: it is rebuilt on the CPU.

    No rotary module, no table. Raises: SRC-ROPE (a learned part that is not known here).
    """
    if rotary is None:
        return {}
    unknown = sorted({name for name, _ in rotary.named_parameters()} - {_LEARNED})
    if unknown:
        raise InputError(
            "SRC-ROPE",
            f"{type(rotary).__name__} learns {', '.join(unknown)}; only {_LEARNED!r} is known",
            hint="this rope has a part that mla-deploy does not know yet; please report it",
        )
    build: Any = type(rotary)
    real: Any = build(config=rotary.config)
    if not hasattr(real, "original_inv_freq"):
        return {kind: _typed_table(real, kind) for kind in real.rope_type}
    table = _table(real)
    if real.config.rope_parameters.get("mrope_section") is not None:
        _require_one_axis(real, table)
    return {"": table}


def _table(real: Any) -> RopeTable:
    parameters = real.config.rope_parameters
    long_inv_freq_F = None
    original = 0
    if parameters["rope_type"] == "longrope":
        original = int(parameters["original_max_position_embeddings"])
        long_inv_freq_F, _ = ROPE_INIT_FUNCTIONS["longrope"](real.config, seq_len=original + 1)
    with torch.no_grad():
        probe = real(torch.zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.int64))
    return RopeTable(
        inv_freq_F=real.original_inv_freq.float(),
        long_inv_freq_F=None if long_inv_freq_F is None else long_inv_freq_F.float(),
        original_length=original,
        scaling=float(real.attention_scaling),
        is_complex=torch.is_tensor(probe) and probe.is_complex(),
    )


def _require_one_axis(real: Any, table: RopeTable) -> None:
    """Text has the same position on every axis of `mrope_section`, and then all sections are one
    plain rope. That is asked of the module itself, not taken for granted.

    Raises: SRC-ROPE.
    """
    positions_BS = torch.arange(64)[None]
    with torch.no_grad():
        given = real(torch.zeros(1, 1, 1), positions_BS)
    found = position_embeddings(real, table, table.sets, positions_BS, torch.tensor([64]))
    alike = [
        one.squeeze().shape == other.squeeze().shape
        and bool(torch.allclose(one.squeeze(), other.squeeze(), atol=1e-5))
        for one, other in zip(given, found, strict=True)
    ]
    if not all(alike):
        raise InputError(
            "SRC-ROPE",
            f"{type(real).__name__} turns by positions on several axes (mrope_section), and text "
            "positions do not make them one",
            hint="only text positions on one axis are known; export the text model alone",
        )


def _typed_table(real: Any, kind: str) -> RopeTable:
    if real.rope_type[kind] == "longrope":
        raise InputError("SRC-ROPE", f"{kind} layers have longrope of their own, not known here")
    return RopeTable(
        inv_freq_F=getattr(real, f"{kind}_original_inv_freq").float(),
        long_inv_freq_F=None,
        original_length=0,
        scaling=float(getattr(real, f"{kind}_attention_scaling")),
        is_complex=False,
    )


def position_embeddings(
    rotary: nn.Module,
    table: RopeTable,
    inv_freqs: Sequence[torch.Tensor],
    positions_BS: torch.Tensor,
    lengths_B: torch.Tensor,
) -> Any:
    """What `rotary` would return: cos_BSR and sin_BSR (each pair's angle twice).

    For a complex module: [B, S, R/2, 2], real part first. `inv_freqs` are the sets of the table,
    `lengths_B` the rows' lengths after the call.
    """
    if positions_BS.dim() == 3:
        positions_BS = positions_BS[0]  # [axes, B, S], and text has one position on all of them
    inv_freq = inv_freqs[0]
    if table.original_length:
        is_long_B11 = lengths_B[:, None, None] > table.original_length
        inv_freq = torch.where(is_long_B11, inv_freqs[1], inv_freqs[0])
    alpha = getattr(rotary, _LEARNED, None)
    if alpha is not None:
        inv_freq = inv_freq * alpha.float().exp()
    angles_BSF = positions_BS[..., None].float() * inv_freq
    cos_BSF, sin_BSF = angles_BSF.cos() * table.scaling, angles_BSF.sin() * table.scaling
    if table.is_complex:
        return torch.stack((cos_BSF, sin_BSF), dim=-1)
    return torch.cat((cos_BSF, cos_BSF), dim=-1), torch.cat((sin_BSF, sin_BSF), dim=-1)
