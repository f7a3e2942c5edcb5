"""TensorRT 11, of datacenter parts: its own attention operator, with no pass over the keys."""

from __future__ import annotations

from mla_deploy.rewrite.lower_expanded_trt import TRT_FUSED
from mla_deploy.rewrite.trt_lines import fused_line

OPERATORS = frozenset({"Attention", "Swish", "trt::TRT_Attention", "trt::TRT_KVCacheUpdate"})
RELEASE = fused_line("11", OPERATORS, TRT_FUSED)
