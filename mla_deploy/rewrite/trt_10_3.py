"""TensorRT 10.3, of JetPack 6: opset 20, primitives; the cache is updated by ScatterND."""

from __future__ import annotations

from mla_deploy.rewrite.trt_lines import primitives_line

RELEASE = primitives_line("10.3")
