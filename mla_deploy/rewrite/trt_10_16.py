"""TensorRT 10.16, of JetPack 7.2: ONNX's own Attention, RMSNormalization and TensorScatter."""

from __future__ import annotations

from mla_deploy.rewrite.lower_expanded_trt import ONNX_FUSED
from mla_deploy.rewrite.trt_lines import fused_line

RELEASE = fused_line("10.16", frozenset({"Attention"}), ONNX_FUSED)
