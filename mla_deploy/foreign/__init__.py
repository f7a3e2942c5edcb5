"""ONNX graphs that other exporters wrote: read with distrust, MLA found in them, proven, raised."""
