"""The manifest an export writes: what the bundle is, made of what, and by what."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import mla_deploy
from mla_deploy.checkpoint import Checkpoint, WeightMap
from mla_deploy.config import MlaConfig
from mla_deploy.export.assemble import Assembled, GraphForm, cache_names, graph_values
from mla_deploy.export.weights import DTYPES, WeightLayout

if TYPE_CHECKING:
    from mla_deploy.export.pipeline import ExportOptions

_LIBRARIES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "safetensors", "numpy")


def manifest_of(
    source: Checkpoint,
    options: ExportOptions,
    form: GraphForm,
    graphs: dict[str, Assembled],
    *,
    layout: WeightLayout,
    weights: WeightMap,
    named: Callable[[str], str],
) -> dict[str, Any]:
    """Everything but `files`, which publishing adds; `named` gives a part's file name."""
    config = source.config
    itemsize = DTYPES[options.dtype].itemsize
    crossover = config.crossover_tokens
    return {
        "format_version": 1,
        "tool": {"name": "mla-deploy", "version": mla_deploy.__version__},
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "source": {
            "config_digest": config.digest,
            "checkpoint_digest": source.digest,
            "files": list(source.files),
            "total_bytes": source.total_bytes,
            "skipped": dict(weights.skipped),
            "notes": list(source.notes),
        },
        "model": _model(config),
        "target": options.target,
        "dtype": options.dtype,
        "cache": {
            "kind": options.cache,
            "layout": options.cache_layout,
            "dtype": options.dtype,
            "itemsize": itemsize,
            "row_width": config.row_width,
            "capacity": options.capacity,
            "bytes_per_token": config.cache_bytes_per_token(itemsize),
        },
        "crossover_tokens": crossover if math.isfinite(crossover) else None,
        "all_logits": options.all_logits,
        "io": _io(form, graphs, named),
        "rewrite": {name: graph.counts for name, graph in graphs.items()},
        "weights": {
            "file": named("weights"),
            "bytes": layout.total_bytes,
            "tensors": len(layout.weights),
        },
    }


def _model(config: MlaConfig) -> dict[str, Any]:
    fields = (
        "model_type",
        "architecture",
        "num_layers",
        "num_heads",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "vocab_size",
        "max_position_embeddings",
        "rope_type",
        "rope_original_length",
        "num_experts",
        "experts_per_token",
    )
    return {name: getattr(config, name) for name in fields}


def _io(
    form: GraphForm, graphs: dict[str, Assembled], named: Callable[[str], str]
) -> dict[str, Any]:
    layers = range(form.config.num_layers)
    pairs = [
        [given, updated]
        for layer in layers
        for given, updated in zip(
            cache_names(form, layer), cache_names(form, layer, out=True), strict=True
        )
    ]
    io: dict[str, Any] = {"alias": [] if form.cache.growing else pairs}
    for name, graph in graphs.items():
        io[name] = {
            "file": named(f"{name}.onnx"),
            "inputs": graph_values(list(graph.model.graph.inputs), _kind),
            "outputs": graph_values(list(graph.model.graph.outputs), _kind),
        }
    return io


def _kind(name: str) -> str:
    if name in ("cache_lengths", "new_lengths"):
        return "length"
    if name.startswith("rope_key_cache"):
        return "rope_key_cache"
    if name.startswith("latent_cache"):
        return "latent_cache"
    return {"input_ids": "token_ids", "logits": "logits"}[name]
