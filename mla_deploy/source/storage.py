"""The source's weights as a half-precision bundle stores them: rounded, nothing else.

Held against this, with a cache that rounds its rows (`cache.py`), a bundle must agree to rounding
noise; what is left between this and the source itself is the price of the dtype, which no export
can avoid.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import nn

from mla_deploy.source.cache import HALVES

# dtype of a weight of that shape
StoredDtype = Callable[[tuple[int, ...]], str]
# a parameter's name and its value -> the value that is stored
Rounded = Callable[[str, torch.Tensor], torch.Tensor]


def round_weights(module: nn.Module, stored_dtype: StoredDtype, done: Collection[str] = ()) -> None:
    """Round each parameter but those of `done` in place as `stored_dtype` says; stacked experts go
    one by one."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if name in done:
                continue
            dtype = stored_dtype(stored_shape(name, tuple(weight.shape)))
            if dtype in HALVES:
                weight.copy_(weight.to(HALVES[dtype]).to(weight.dtype))


def transform_weights(module: nn.Module, rounded: Rounded) -> frozenset[str]:
    """Put `rounded(name, weight)` in place of each parameter; the names of those that changed.

    A tied parameter is done once, under its first name.
    """
    changed = set()
    with torch.no_grad():
        for name, weight in module.named_parameters():
            found = rounded(name, weight)
            if found is not weight:
                weight.copy_(found)
                changed.add(name)
    return frozenset(changed)


def stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the tensor in the weight file: one expert, gate and up apart."""
    if len(shape) != 3:
        return shape
    return (shape[1] // 2 if name.endswith("gate_up_proj") else shape[1], shape[2])
