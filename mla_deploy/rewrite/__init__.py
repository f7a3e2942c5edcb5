"""ONNX to ONNX: raise, absorb, lower. `order.py` is the list; one rule family per file."""
