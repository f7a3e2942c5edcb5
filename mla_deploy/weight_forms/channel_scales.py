"""Scales of channels, folded into weights: the model computes the same, and rounds better.

    norm       w x / rms(x)        w / s          every matrix that reads it      columns * s
    product    (W_up h) * g        rows / s       every matrix that reads it      columns * s
    heads      P (W_uv c)          rows / s       o_proj                          columns * s

So a channel whose inputs are large takes less of the eight bits that its neighbours in a block are
rounded to, and a channel that matters has more of the steps of a weight (SmoothQuant 2211.10438,
AWQ 2306.00978). Nothing of it is left in a graph.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

SCALE = ".channel_scale"  # beside a maker's name: its scales in the weight file
_EXPERT = re.compile(r"(?P<prefix>.*\.experts)\.\d+\.(?:gate_proj|up_proj)\.weight")


@dataclass(frozen=True)
class ChannelScales:
    """`scales`: a maker's parameter -> what its channels are divided by, fp32 [K]; of kv_b_proj
    [H, N+V], with ones for the rows of keys. `readers`: a parameter whose columns are multiplied by
    them -> its maker."""

    scales: Mapping[str, torch.Tensor] = field(default_factory=dict)
    readers: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.scales)

    def __call__(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """What stands in place of the parameter `name`, or of one expert's matrix of a stack."""
        return self.rows(name, weight, 0, weight.shape[0] if weight.dim() else 0)

    def rows(self, name: str, weight: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The same of its rows `start` to `stop`, which `weight` holds."""
        expert = _EXPERT.fullmatch(name)
        maker = self.readers.get(name)
        if maker is None and expert is not None:
            maker = self.readers.get(f"{expert['prefix']}.gate_up_proj")
        if maker is not None:
            weight = weight.float() * _columns(self.scales[maker], weight.shape[-1])
        own = self.scales.get(name)
        if own is not None:
            part = own.flatten()[start:stop]
            weight = weight.float() / (part if weight.dim() == 1 else part[:, None])
        return weight


def of_heads(scale_K: torch.Tensor, heads: int, nope: int) -> torch.Tensor:
    """[H*V] -> [H, N+V], as a maker that is kv_b_proj has them."""
    scale_HV = scale_K.view(heads, -1)
    return torch.cat((scale_HV.new_ones(heads, nope), scale_HV), dim=1)


def _columns(scale: torch.Tensor, width: int) -> torch.Tensor:
    """Those of a reader's `width` columns."""
    if scale.dim() == 1:
        return scale
    return scale[:, -(width // len(scale)) :].flatten()
