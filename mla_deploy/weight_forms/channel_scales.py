"""Scales of channels, folded into weights: the model computes the same, and rounds better.

    norm       w x / rms(x)        w / s          every matrix that reads it      columns * s
    product    (W_up h) * g        rows / s       every matrix that reads it      columns * s

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
    """`scales`: a maker's parameter -> what its channels are divided by, fp32 [K]; `readers`: a
    parameter whose columns are multiplied by them -> its maker."""

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
            weight = weight.float() * self.scales[maker]
        own = self.scales.get(name)
        if own is not None:
            part = own[start:stop]
            weight = weight.float() / (part if weight.dim() == 1 else part[:, None])
        return weight

    def is_changed(self, name: str) -> bool:
        """Whether a parameter, or an expert's matrix, is another one."""
        expert = _EXPERT.fullmatch(name)
        stack = None if expert is None else f"{expert['prefix']}.gate_up_proj"
        return name in self.scales or name in self.readers or stack in self.readers
