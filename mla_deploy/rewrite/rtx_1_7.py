"""TensorRT-RTX 1.7, which builds engines with no GPU at hand: to our graphs what TensorRT 11 is."""

from __future__ import annotations

from mla_deploy.rewrite.lower_expanded_trt import TRT_FUSED
from mla_deploy.rewrite.trt_11 import OPERATORS
from mla_deploy.rewrite.trt_lines import fused_line

RELEASE = fused_line("rtx-1.7", OPERATORS, TRT_FUSED)
