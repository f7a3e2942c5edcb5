"""Writes the decode graph of transformers' own OnnxExporter, as it comes and with its CPU fusions.

In a process of its own, since it takes minutes and gigabytes, patches torch and writes hundreds of
lines of advice, none of which should be in the process that measures.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime
from transformers.exporters.utils import decompose_for_generation

from mla_deploy.checkpoint import open_checkpoint
from mla_deploy.source import module_from_checkpoint

FORMS = ("plain", "fused")


def write_exporter_graph(checkpoint: str, out: str) -> dict[str, float]:
    """Multi-token decode with every axis dynamic, as `export_for_generation` makes it, saved under
    `out` as `plain/model.onnx` and `fused/model.onnx`; the seconds are those of the export alone.
    """
    with open_checkpoint(Path(checkpoint)) as source:
        module = module_from_checkpoint(source)
    module.set_attn_implementation("sdpa")  # transformers' default
    if module._can_set_experts_implementation():
        module.set_experts_implementation("batched_mm")  # the eager one loops over data
    torch.manual_seed(0)
    ids = torch.randint(3, module.config.vocab_size, (2, 5))
    start = time.perf_counter()
    stages = decompose_for_generation(
        module, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, multi_token_decode=True
    )
    submodel, inputs = stages["decode"]
    exported = OnnxExporter().export(submodel, inputs, OnnxConfig(dynamic=True))
    seconds = time.perf_counter() - start
    exported.save_pretrained(str(Path(out) / "plain"))
    fuse_for_onnxruntime(exported.program, "cpu")  # what its option `ort_fusions="cpu"` adds
    exported.save_pretrained(str(Path(out) / "fused"))
    return {"seconds": seconds}


if __name__ == "__main__":
    print(json.dumps(write_exporter_graph(sys.argv[1], sys.argv[2])))
