"""A tied weight that stands on disk all the same: allowed when it is the weight that it shares."""

from __future__ import annotations

from math import prod

from mla_deploy.checkpoint.weight_map import WeightMap
from mla_deploy.errors import InputError, quoted

_BLOCK_VALUES = 1 << 22


def check_tied(weights: WeightMap) -> None:
    """Refuse a tensor on disk that config.json ties to another one with other values.

    The model would silently lose it. Both are read in blocks of rows.
    Raises: InputError CKPT-TIED, and as `Checkpoint.read`.
    """
    tensors = weights.checkpoint.tensors
    for name, owner in weights.tied.items():
        shared = weights.slices.get(owner)
        if name in tensors and shared is not None and not _equal(weights, name, shared.tensor):
            raise InputError(
                "CKPT-TIED",
                f"{quoted(name)} differs from {quoted(owner)}, config.json says that they are one",
                hint="set tie_word_embeddings to false in config.json if both are meant",
                tensor=name,
            )


def _equal(weights: WeightMap, one: str, other: str) -> bool:
    import torch

    checkpoint = weights.checkpoint
    shape = checkpoint.tensors[one].shape
    if shape != checkpoint.tensors[other].shape:
        return False
    step = max(1, _BLOCK_VALUES // prod(shape[1:]))
    for start in range(0, shape[0], step):
        rows = slice(start, min(start + step, shape[0]))
        first, second = checkpoint.read(one, rows), checkpoint.read(other, rows)
        if not torch.equal(first.float(), second.float()):
            return False
    return True
