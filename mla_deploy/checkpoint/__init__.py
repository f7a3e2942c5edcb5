"""Bytes on disk to named tensors, lazily; trusts nothing. See `reader.py` and `weight_map.py`."""

from mla_deploy.checkpoint.header import TensorInfo
from mla_deploy.checkpoint.reader import Checkpoint, open_checkpoint
from mla_deploy.checkpoint.slices import Place, StackedSlices, TensorSlice, Zeros
from mla_deploy.checkpoint.weight_map import WeightMap, map_weights

__all__ = [
    "Checkpoint",
    "Place",
    "StackedSlices",
    "TensorInfo",
    "TensorSlice",
    "WeightMap",
    "Zeros",
    "map_weights",
    "open_checkpoint",
]
