"""A bundle for rtx-40 with two real, small graphs: one absorbed layer each, in `small_graphs.py`'s
sizes. It builds in under a second."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import onnx

from mla_deploy.bundle import Bundle, stage_bundle
from tests import small_bundle
from tests.engine.small_graphs import CAPACITY, HEADS, LATENT, ROPE, ROW, VOCAB, decode_layer

CONFIG = {
    **small_bundle.CONFIG, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": HEADS,
    "kv_lora_rank": LATENT, "qk_rope_head_dim": ROPE, "vocab_size": VOCAB,
}  # fmt: skip


def manifest(target: str = "rtx-40", release: str = "rtx-1.7", **changes: Any) -> dict[str, Any]:
    """A manifest without `files` for `decode_layer(1)` in both graphs."""
    cache = {"input": "latent_cache.0", "output": "latent_cache_out.0", "layer": 0,
             "kind": "latent_cache", "rows": "tokens", "elements": ROW}  # fmt: skip
    shape = ["batch", 1, CAPACITY, ROW]
    inputs = [
        {"name": "input_ids", "dtype": "int64", "shape": ["batch", "new_tokens"],
         "kind": "token_ids"},
        *({"name": name, "dtype": "int64", "shape": ["batch"], "kind": "length"}
          for name in ("cache_lengths", "new_lengths")),
        {"name": cache["input"], "dtype": "fp16", "shape": shape, "kind": "latent_cache"},
    ]  # fmt: skip
    outputs = [
        {"name": "logits", "dtype": "fp32", "shape": ["batch", "new_tokens", VOCAB],
         "kind": "logits"},
        {"name": cache["output"], "dtype": "fp16", "shape": shape, "kind": "latent_cache"},
    ]  # fmt: skip
    made = small_bundle.manifest()
    model = {**made["model"], "num_heads": HEADS, "kv_lora_rank": LATENT, "qk_rope_head_dim": ROPE,
             "vocab_size": VOCAB}  # fmt: skip
    io = {graph: {"file": f"{graph}.onnx", "inputs": inputs, "outputs": outputs}
          for graph in ("prefill", "decode")}  # fmt: skip
    return {
        **made, "model": model, "target": target, "dtype": "fp16", "all_logits": True,
        "cache": {"kind": "in-place", "layout": "fused", "dtype": "fp16", "itemsize": 2,
                  "row_width": ROW, "capacity": CAPACITY, "bytes_per_token": 2 * ROW,
                  "tensors": [cache]},
        "io": {**io, "alias": [[cache["input"], cache["output"]]]},
        "engine": {"release": release, "profiles": {
            "prefill": {"batch": [1, 1, 1], "new_tokens": [1, 16, 32]},
            "decode": {"batch": [1, 1, 4], "new_tokens": [1, 1, 1]},
        }},
        **changes,
    }  # fmt: skip


def write_engine_bundle(out: Path, graph: onnx.ModelProto | None = None, **changes: Any) -> Bundle:
    """Publish it at `out`; `graph` takes the place of both graphs, `changes` go to `manifest`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        onnx.save_model(graph or decode_layer(), path, save_as_external_data=True,
                        location="weights.safetensors", size_threshold=0)  # fmt: skip
        weights = (Path(folder) / "weights.safetensors").read_bytes()
        files = {**small_bundle.FILES, "weights.safetensors": weights,
                 "config.json": json.dumps(CONFIG).encode(),
                 **dict.fromkeys(("prefill.onnx", "decode.onnx"), path.read_bytes())}  # fmt: skip
    made = manifest(**changes)
    made["weights"] = {"file": "weights.safetensors", "bytes": len(weights), "tensors": 1}
    with stage_bundle(out) as stage:
        small_bundle.fill(stage, files)
        return stage.publish(made)
