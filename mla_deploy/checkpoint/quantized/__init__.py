"""Quantised weights: found among the tensors on disk, shown as float32 weights, read by rows.

One file per layout; `inventory.py` holds the table of them and finds the weights, `parts.py` what
they share.
"""

from mla_deploy.checkpoint.quantized.inventory import Inventory, take_inventory
from mla_deploy.checkpoint.quantized.parts import QuantizedTensor
from mla_deploy.checkpoint.quantized.rows import read_quantized

__all__ = ["Inventory", "QuantizedTensor", "read_quantized", "take_inventory"]
