"""A bundle of about 4 KiB that satisfies every rule of the manifest; its graphs are stand-ins.

For tests of what holds bundles together. Tests that run a graph export one from `tiny.py`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mla_deploy.bundle import Bundle, Stage, stage_bundle

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 48,
    "rms_norm_eps": 1e-6,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "vocab_size": 96,
    "max_position_embeddings": 128,
}
FILES: dict[str, bytes] = {
    "prefill.onnx": b"stand-in for the prefill graph" * 2,
    "decode.onnx": b"stand-in for the decode graph" * 2,
    "weights.safetensors": bytes(range(256)),
    "config.json": json.dumps(CONFIG).encode(),
    "tokenizer.json": b'{"model": {}}',
}


def manifest(**changes: Any) -> dict[str, Any]:
    """A manifest without `files`, one layer, in-place fused fp32 cache; `changes` replace keys."""
    caches = [f"latent_cache.{layer}" for layer in range(1)]
    inputs = [
        {"name": "input_ids", "dtype": "int64", "shape": ["batch", "new_tokens"],
         "kind": "token_ids"},
        {"name": "cache_lengths", "dtype": "int64", "shape": ["batch"], "kind": "length"},
        {"name": "new_lengths", "dtype": "int64", "shape": ["batch"], "kind": "length"},
        *({"name": name, "dtype": "fp32", "shape": ["batch", 1, "capacity", 24],
           "kind": "latent_cache"} for name in caches),
    ]  # fmt: skip
    outputs = [
        {"name": "logits", "dtype": "fp32", "shape": ["batch", 96], "kind": "logits"},
        *({"name": name.replace(".", "_out."), "dtype": "fp32",
           "shape": ["batch", 1, "capacity", 24], "kind": "latent_cache"} for name in caches),
    ]  # fmt: skip
    made: dict[str, Any] = {
        "tool": {"name": "mla-deploy", "version": "0.1.0"},
        "libraries": {"onnx": "1.23.0"},
        "source": {"config_digest": "0" * 64, "checkpoint_digest": "1" * 64,
                   "files": ["model.safetensors"], "total_bytes": 256, "skipped": {}},
        "model": {"model_type": "deepseek_v3", "architecture": "DeepseekV3ForCausalLM",
                  "num_layers": 1, "num_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
                  "qk_rope_head_dim": 8, "v_head_dim": 8, "vocab_size": 96,
                  "max_position_embeddings": 128, "rope_type": "default",
                  "rope_original_length": None, "num_experts": 0, "experts_per_token": 0},
        "target": "cpu",
        "dtype": "fp32",
        "cache": {"kind": "in-place", "layout": "fused", "dtype": "fp32", "itemsize": 4,
                  "row_width": 24, "capacity": 64, "bytes_per_token": 96,
                  "tensors": [{"input": name, "output": name.replace(".", "_out."), "layer": 0,
                               "kind": "latent_cache", "rows": "tokens", "elements": 24}
                              for name in caches]},
        "crossover_tokens": 32.0,
        "all_logits": False,
        "io": {
            "prefill": {"file": "prefill.onnx", "inputs": inputs, "outputs": outputs},
            "decode": {"file": "decode.onnx", "inputs": inputs, "outputs": outputs},
            "alias": [[name, name.replace(".", "_out.")] for name in caches],
        },
        "rewrite": {"prefill": {"lower": 2}, "decode": {"absorb": 2}},
        "weights": {"file": "weights.safetensors", "bytes": 256, "tensors": 1},
    }  # fmt: skip
    return {**made, **changes}


def fill(stage: Stage, files: dict[str, bytes] | None = None) -> None:
    """Write the files of the bundle into a stage."""
    for name, data in (FILES if files is None else files).items():
        stage.write_bytes(name, data)


def write_bundle(
    out: str | os.PathLike[str], files: dict[str, bytes] | None = None, **options: Any
) -> Bundle:
    """Publish the bundle at `out`; `options` go to `stage_bundle`."""
    with stage_bundle(out, **options) as stage:
        fill(stage, files)
        return stage.publish(manifest())


def names_in(folder: Path) -> list[str]:
    """What stands in a folder, dot files included."""
    return sorted(path.name for path in folder.iterdir())
