"""Bytes on disk to named tensors, lazily; trusts nothing. See `reader.py` and `weight_map.py`."""

from mla_deploy.checkpoint.header import TensorInfo
from mla_deploy.checkpoint.reader import Checkpoint, open_checkpoint
from mla_deploy.checkpoint.weight_map import TensorSlice, WeightMap, map_weights

__all__ = [
    "Checkpoint",
    "TensorInfo",
    "TensorSlice",
    "WeightMap",
    "map_weights",
    "open_checkpoint",
]
