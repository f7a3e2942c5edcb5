"""A tied weight that stands on disk all the same: allowed when it is the weight that it shares."""

from __future__ import annotations

from math import prod

from mla_deploy.checkpoint.slices import StackedSlices, TensorSlice
from mla_deploy.checkpoint.weight_map import WeightMap
from mla_deploy.errors import InputError, quoted

_BLOCK_VALUES = 1 << 22


def check_tied(weights: WeightMap) -> None:
    """Refuse a tensor on disk that config.json ties to another one with other values.

    The model would silently lose it. Both are read in blocks of rows.
    Raises: InputError CKPT-TIED, and as `Checkpoint.read`.
    """
    for name, on_disk in weights.tied_on_disk.items():
        owner = weights.tied[name]
        if owner in weights.slices and not _equal(weights, on_disk, owner):
            raise not_tied(on_disk, owner)


def not_tied(on_disk: str, owner: str) -> InputError:
    """The refusal of a tensor that is not the one it is tied to."""
    return InputError(
        "CKPT-TIED",
        f"{quoted(on_disk)} differs from {quoted(owner)}, config.json says they are one",
        hint="set tie_word_embeddings to false in config.json if both are meant",
        tensor=on_disk,
    )


def _equal(weights: WeightMap, one: str, owner: str) -> bool:
    """Row by row, but for those that the model class sets to zero in both."""
    place = weights.slices[owner]
    if weights.checkpoint.tensors[one].shape != place.shape:
        return False
    parts = place.parts if isinstance(place, StackedSlices) else (place,)
    offset = 0
    for part in parts:
        height = part.shape[0]
        if isinstance(part, TensorSlice) and not _equal_rows(weights, one, owner, offset, height):
            return False
        offset += height
    return True


def _equal_rows(weights: WeightMap, one: str, owner: str, offset: int, height: int) -> bool:
    import torch

    step = max(1, _BLOCK_VALUES // prod(weights.slices[owner].shape[1:]))
    for start in range(offset, offset + height, step):
        stop = min(start + step, offset + height)
        first = weights.checkpoint.read(one, slice(start, stop))
        second = weights.read_rows(owner, start, stop)
        if not torch.equal(first.float(), second.float()):
            return False
    return True
