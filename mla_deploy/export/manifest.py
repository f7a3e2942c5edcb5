"""The manifest an export writes: what the bundle is, made of what, and by what."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import onnx_ir as ir

import mla_deploy
from mla_deploy.cache_plan import ITEM_BYTES
from mla_deploy.config import CONFIG_NAME, MlaConfig
from mla_deploy.export.assemble import Assembled
from mla_deploy.export.static_scales import LatentScales
from mla_deploy.export.trace import Trace
from mla_deploy.export.weights import WeightLayout
from mla_deploy.latent_store import manifest_entry
from mla_deploy.rewrite.releases import find_release
from mla_deploy.source.cache_parts import CacheBuffer
from mla_deploy.source.classes import source_class
from mla_deploy.source.latent_rotation import KIND
from mla_deploy.targets import find_target

if TYPE_CHECKING:
    from mla_deploy.export.options import ExportOptions

_LIBRARIES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "safetensors", "numpy")

# (least, usual, most) rows, and new tokens of a call: a runner prefills in chunks of 512.
_PROFILES = {"prefill": ((1, 1, 1), (1, 512, 512)), "decode": ((1, 1, 4), (1, 1, 1))}


class Source(Protocol):
    """What a bundle is made of, as far as its manifest tells: a checkpoint or a user's module."""

    @property
    def digest(self) -> str: ...
    @property
    def config(self) -> MlaConfig: ...
    @property
    def files(self) -> tuple[str, ...]: ...
    @property
    def total_bytes(self) -> int: ...
    @property
    def notes(self) -> tuple[str, ...]: ...


class Skipping(Protocol):
    """Where weights come from, as far as the manifest tells: what was left out."""

    @property
    def skipped(self) -> Mapping[str, int]: ...


def manifest_of(
    source: Source,
    options: ExportOptions,
    trace: Trace,
    graphs: dict[str, Assembled],
    *,
    layout: WeightLayout,
    weights: Skipping,
    named: Callable[[str], str],
) -> dict[str, Any]:
    """Everything but `files`, which publishing adds; `named` gives a part's file name."""
    config, scales = source.config, layout.latent_scales
    crossover = config.crossover_tokens
    tensors = [_cache_tensor(buffer, options.rows_dtype, scales) for buffer in trace.all_buffers]
    return {
        **_engine(options),
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
            "dtype": options.cache_dtype,
            "itemsize": ITEM_BYTES[options.rows_dtype],
            "row_width": config.row_width,
            "capacity": options.capacity,
            "bytes_per_token": sum(
                t["elements"] * ITEM_BYTES[t["dtype"]] for t in tensors if t["rows"] == "tokens"
            ),
            "tensors": tensors,
            **_store(options, config, scales),
            **({"dtype_from": CONFIG_NAME} if options.cache_by_config else {}),
            **({"rotation": {"kind": KIND}} if options.rotate_latent else {}),
        },
        "crossover_tokens": crossover if math.isfinite(crossover) else None,
        "all_logits": options.all_logits,
        "io": _io(trace, graphs, named),
        "rewrite": {name: graph.counts for name, graph in graphs.items()},
        "weights": {
            "file": named("weights"),
            "bytes": layout.total_bytes,
            "tensors": len(layout.weights) + len(layout.copied),
            **_kept(options, layout),
            **_quantized(options, layout),
        },
    }


def _kept(options: ExportOptions, layout: WeightLayout) -> dict[str, Any]:
    """What was copied as it is, scales counted too; only where that was asked for."""
    if options.weights != "keep" or options.in_place:
        return {}
    copied = layout.copied.values()
    return {"kept": {"tensors": len(copied), "bytes": sum(tensor.nbytes for tensor in copied)}}


def _quantized(options: ExportOptions, layout: WeightLayout) -> dict[str, Any]:
    """The form of each role, and what of the file is in such a form; only where asked for."""
    if options.plan is None:
        return {}
    parts = [weight for weight in layout.weights.values() if weight.use.part is not None]
    values = [weight for weight in parts if weight.use.part and weight.use.part.name == "values"]
    return {
        "quantized": {
            **options.plan.to_dict(),
            "tensors": len(values),
            "bytes": sum(weight.nbytes for weight in parts),
            **({} if layout.calibration is None else {"calibration": layout.calibration}),
        }
    }


def _engine(options: ExportOptions) -> dict[str, Any]:
    """What a builder of engines needs to know, for a TensorRT target.

    `writes_padding`: a call needs cache_lengths + new_tokens <= capacity in every row, idle ones
    too. `stale_slots`: what slots beyond a row's length may hold; zeros at first.
    """
    target = find_target(options.target)
    if target.release is None:
        return {}
    release = find_release(target.release)
    return {
        "engine": {
            "release": release.name,
            "opset": release.opset,
            "sm": target.sm,
            "capacity": options.capacity,
            "writes_padding": release.has_tensor_scatter,
            "stale_slots": "finite",
            "profiles": {
                name: {"batch": list(batch), "new_tokens": list(new_tokens)}
                for name, (batch, new_tokens) in _PROFILES.items()
            },
        }
    }


def _model(config: MlaConfig) -> dict[str, Any]:
    fields = (
        "model_type",
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
    # A config.json need not name its class.
    named = config.architecture or source_class(config).model.__name__
    return {"architecture": named, **{name: getattr(config, name) for name in fields}}


def _store(
    options: ExportOptions, config: MlaConfig, scales: LatentScales | None
) -> dict[str, Any]:
    """How codes and scales are read as latents, where they are codes."""
    if options.store is None:
        return {}
    store = manifest_entry(options.store, config.kv_lora_rank, config.qk_rope_head_dim)
    return {"store": store if scales is None else {**store, "calibration": scales.to_dict()}}


def _cache_tensor(
    buffer: CacheBuffer, rows_dtype: str, scales: LatentScales | None
) -> dict[str, Any]:
    """One cache tensor: `elements` are those of one row, or of the whole state.

    `scales`: of static codes, what a code of each channel is multiplied by.
    """
    rows: str | int = "state" if buffer.is_state else buffer.window or "tokens"
    return {
        "input": buffer.name(),
        "output": buffer.name(out=True),
        "kind": buffer.kind,
        "layer": buffer.index,
        "rows": rows,
        "elements": buffer.elements,
        "dtype": "fp32" if buffer.is_state else buffer.stored or rows_dtype,
        "parts": {part.kind: part.shape[0] for part in buffer.parts if not buffer.is_state},
        **({"scales": scales.told(buffer.index)} if scales and buffer.stored == "int8" else {}),
    }


def _io(trace: Trace, graphs: dict[str, Assembled], named: Callable[[str], str]) -> dict[str, Any]:
    pairs = [[b.name(), b.name(out=True)] for b in trace.all_buffers if _is_in_place(b)]
    io: dict[str, Any] = {"alias": [] if trace.form.growing else pairs}
    for name, graph in graphs.items():
        io[name] = {
            "file": named(f"{name}.onnx"),
            "inputs": _graph_values(list(graph.model.graph.inputs), _kind),
            "outputs": _graph_values(list(graph.model.graph.outputs), _kind),
        }
    return io


def _is_in_place(buffer: CacheBuffer) -> bool:
    """Rows of every token are written where they lie; a ring or a state is read first, then new."""
    return not buffer.is_state and buffer.window is None


def _kind(name: str) -> str:
    if name in ("cache_lengths", "new_lengths"):
        return "length"
    known = {"input_ids": "token_ids", "logits": "logits", "verify_logits": "logits"}
    return known.get(name) or name.partition(".")[0].removesuffix("_out")


def _graph_values(values: list[ir.Value], kind_of: Callable[[str], str]) -> list[dict[str, object]]:
    """The manifest's `io` entries of graph inputs or outputs."""
    names = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
    names.update({ir.DataType.INT64: "int64", ir.DataType.UINT8: "uint8", ir.DataType.INT8: "int8"})
    return [
        {
            "name": str(v.name),
            "dtype": names[v.dtype] if v.dtype is not None else "",
            "shape": [d if isinstance(d, int) else str(d.value) for d in v.shape or ()],
            "kind": kind_of(str(v.name)),
        }
        for v in values
    ]
