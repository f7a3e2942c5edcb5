"""What runs beside an engine on a device: Python 3.8's library, numpy, TensorRT, and nothing else.

CUDA is reached through ctypes, so that a Jetson as it is flashed needs no package more. These files
are copied as they are into every device package, where `build.py` and `verify.py` run them; the
TensorRT runner of this package runs the same ones.
"""
