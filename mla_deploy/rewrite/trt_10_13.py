"""TensorRT 10.13, of JetPack 7.0 and 7.1: to our graphs what 10.3 is."""

from __future__ import annotations

from mla_deploy.rewrite.trt_lines import primitives_line

RELEASE = primitives_line("10.13")
