"""`export`: the whole way from a checkpoint folder to a published bundle."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir

from mla_deploy.bundle import Bundle, Stage, refuse_overlap, stage_bundle, stage_in_place
from mla_deploy.checkpoint import Checkpoint, WeightMap, open_checkpoint
from mla_deploy.checkpoint.tied import check_tied
from mla_deploy.config import MlaConfig
from mla_deploy.door import open_folder
from mla_deploy.errors import InputError
from mla_deploy.export.assemble import Assembled
from mla_deploy.export.bind import bind_weights
from mla_deploy.export.bundle_source import BundleSource
from mla_deploy.export.calibration.calibrate import calibrate
from mla_deploy.export.calibration.text import CalibrationText, calibration_text
from mla_deploy.export.copied import copy_kept
from mla_deploy.export.in_place import Kept, files_section, keep, own_dtype, require_plain_files
from mla_deploy.export.joined import graph_bytes, write_joined
from mla_deploy.export.keep import WAYS, kept_dtype, require_keepable
from mla_deploy.export.lowered import any_capacity, lowered
from mla_deploy.export.manifest import Source, manifest_of
from mla_deploy.export.options import ExportOptions, options_for
from mla_deploy.export.rotated import rotated_weights
from mla_deploy.export.scaled import scaled_source
from mla_deploy.export.static_scales import latent_scales, require_static
from mla_deploy.export.trace import Trace, trace_model
from mla_deploy.export.trace_layer import CacheForm
from mla_deploy.export.weights import DTYPES, WeightLayout, WeightSource
from mla_deploy.export.widen import point_in_place
from mla_deploy.latent_store import STATIC
from mla_deploy.rewrite import order
from mla_deploy.rewrite.ensures import require_latent_only
from mla_deploy.source.model import source_weights
from mla_deploy.targets import find_target
from mla_deploy.weight_forms.form import KINDS, is_plan
from mla_deploy.weight_forms.rounded import PlanRounding

TOKENIZER_TEXTS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_TEXTS = ("config.json", *TOKENIZER_TEXTS)
_COPY_LIMIT = 64 * 1024 * 1024

Progress = Callable[[str, int, int], None]  # stage, done, total


def export(
    checkpoint: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    module: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    in_place: bool = False,
    target: str | None = None,
    dtype: str | None = None,
    cache: str | None = None,
    cache_layout: str | None = None,
    cache_dtype: str | None = None,
    capacity: int | None = None,
    all_logits: bool = False,
    calibrate: str | os.PathLike[str] | None = None,
    rotate_latent: bool = False,
    replace: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Export an MLA checkpoint as a bundle: prefill and decode graphs over one weight file.

    `dtype` (fp32 by default) is the storage of weights and cache; arithmetic on a CPU is fp32.
    `cache_dtype`: of the cache alone (None: `latent_cache_dtype` of config.json, else `dtype`);
    int8 and its kin are codes with scales (`latent_store.py`), of int8-static found on `calibrate`
    or a sample; `rotate_latent` evens out channels; `capacity`: tokens a row reserves by default.
    `weights` "keep": they are stored as in the checkpoint instead, FP8 and int8 with their scales,
    and the cache in the dtype of most of them; what must be made (halves of kv_b_proj) in float.
    "int4", "int8", "fp8" or a refined one (`weight_forms/form.py`): quantised, rounded to nearest,
    or fitted to what weights meet in the text file `calibrate`, if that serves its end better.
    Nothing is left under `out` unless everything succeeded; `replace` swaps whole bundles.
    `module`, `package.file:factory`, in place of a checkpoint: the user's own torch.nn.Module, with
    `weights`, one `.safetensors` file (None: as the factory set them). This runs the user's code.
    `in_place`, without `out`, writes the bundle beside the checkpoint, as files `mla-deploy.*` of
    its folder: weights stay in the checkpoint's files and dtype, and are not read.

    Raises: CFG-*, CKPT-*, SRC-*, EXP-* (input), BUN-EXISTS, BUN-BUSY, TARGET-*, ENV-*, REW-*.
    """
    report = progress or (lambda *_: None)
    _require_one_source(checkpoint, module, weights, out, in_place)
    options_of = partial(
        options_for,
        target=target,
        cache=cache,
        cache_layout=cache_layout,
        cache_dtype=cache_dtype,
        capacity=capacity,
        all_logits=all_logits,
        in_place=in_place,
        calibrate=None if calibrate is None else os.fspath(calibrate),
        rotate_latent=rotate_latent,
    )
    if module is not None and out is not None:
        from mla_deploy.export.module_export import export_module

        chosen = partial(options_of, dtype=dtype, weights=None)
        return export_module((module, weights), out, chosen, replace=replace, report=report)
    with open_checkpoint(Path(checkpoint or "")) as source:
        options = _options(source, options_of, dtype, in_place, weights)
        with _staged(source, out, options, replace) as stage:
            return build_bundle(source, _weights(source, rotate_latent), stage, options, report)


def _require_one_source(
    checkpoint: object, module: object, weights: object, out: object, in_place: bool
) -> None:
    """A checkpoint or a module; to an output or, for a checkpoint, in place."""
    for is_wrong, told in (
        (in_place == (out is not None), "goes to an output or in place; wanted one of the two"),
        ((module is None) == (checkpoint is None), "takes a checkpoint or a module; wanted one"),
        (module is not None and in_place, "of a module goes to an output, not in place"),
        (
            module is None and weights is not None and not _is_way(str(weights)),
            f"of a checkpoint takes weights {' or '.join((*WAYS, *KINDS))}, not {weights!r}",
        ),
        (in_place and is_plan(str(weights)), "in place leaves weights as they are"),
    ):
        if is_wrong:
            raise InputError("EXP-OPTION", f"an export {told}")


def _options(
    source: Checkpoint,
    options_of: Callable[..., ExportOptions],
    dtype: str | None,
    in_place: bool,
    weights: str | os.PathLike[str] | None,
) -> ExportOptions:
    found = _dtype(source, dtype, in_place, weights)
    told = None if weights is None else str(weights)
    return options_of(source.config, dtype=found, weights=told)


def _weights(source: Checkpoint, rotate_latent: bool) -> WeightMap:
    found = source_weights(source)
    return rotated_weights(source.config, found) if rotate_latent else found


def _dtype(source: Checkpoint, asked: str | None, in_place: bool, weights: object) -> str | None:
    if in_place:
        return own_dtype(source, asked)
    return kept_dtype(source, asked) if weights == "keep" else asked


def _is_way(weights: str) -> bool:
    return weights in WAYS or is_plan(weights)


def _staged(
    source: Checkpoint, out: str | os.PathLike[str] | None, options: ExportOptions, replace: bool
) -> AbstractContextManager[Stage]:
    if out is None:
        require_plain_files(source)
        return stage_in_place(source.folder, replace=replace)
    refuse_overlap(out, source.folder)
    elements = sum(prod(info.shape) for info in source.tensors.values())
    needed = elements * DTYPES[options.dtype].itemsize
    if options.weights == "keep":
        needed = source.total_bytes
    return stage_bundle(out, replace=replace, needed_bytes=needed)


class Described(Source, Protocol):
    """A source that knows its folder: a checkpoint, or a bundle."""

    @property
    def folder(self) -> Path: ...


def build_bundle(
    source: Described,
    weights: WeightMap | BundleSource,
    stage: Stage,
    options: ExportOptions,
    report: Progress,
) -> Bundle:
    """Trace, rewrite, write and publish what `options` ask for.

    Raises: as `export`.
    """
    config = source.config
    # All that headers and small files can get refused comes before the trace, which takes seconds.
    checkpoint = weights if isinstance(weights, WeightMap) else None
    if checkpoint is not None:
        check_tied(checkpoint)
        if options.weights == "keep":
            require_keepable(checkpoint, find_target(options.target))
    if not options.in_place:
        copy_texts(source.folder, stage, _TEXTS)
    text = _text(source, options)
    report("trace", 0, 1)
    trace = trace_model(config, _cache_form(config, options), options.all_logits)
    report("trace", 1, 1)
    layout = WeightLayout()
    _find_scales(config, weights, options, layout, text=text, report=report)
    graphs = lowered(trace, config, options, layout)
    _require_fired(graphs, trace)
    report("rewrite", 1, 1)
    kept: Kept = {}
    place = source.folder if options.in_place else stage.path
    if checkpoint is not None and (options.in_place or options.weights == "keep"):
        kept = keep(layout, checkpoint, [graph.model for graph in graphs.values()])
        if not options.in_place:
            kept = copy_kept(layout, kept, checkpoint.checkpoint, stage.named("weights"))
        stage.require_space(layout.total_bytes)
    _calibrate(config, weights, options, layout, text=text, report=report)
    write_weights(scaled_source(weights, layout), layout, stage, report)
    for graph in graphs.values():
        bind_weights(graph.model, layout, stage.path, stage.named("weights"))
        point_in_place(graph.model, kept, place)
    protos = {name: ir.to_proto(graph.model) for name, graph in graphs.items()}
    checked = any_capacity(protos["decode"], options.capacity)
    require_latent_only(checked, _most_heads(config), widest_row(trace))
    joined = _write_graphs(stage, options, protos)
    report("publish", 0, 1)
    manifest = manifest_of(
        source, options, trace, graphs, layout=layout, weights=weights, named=stage.named
    )
    manifest.update(joined)
    if options.in_place and checkpoint is not None:
        manifest["in_place"] = files_section(checkpoint.checkpoint, _TEXTS, kept)
    bundle = stage.publish(manifest)
    report("publish", 1, 1)
    return bundle


def _cache_form(config: MlaConfig, options: ExportOptions) -> CacheForm:
    return CacheForm(
        fused=options.cache_layout == "fused",
        growing=options.cache == "growing",
        least_rows=1 + int(config.raw.get("index_kpool") or 1),
        store=options.store,
    )


def _write_graphs(
    stage: Stage, options: ExportOptions, graphs: Mapping[str, Any]
) -> dict[str, Any]:
    """Both ModelProtos, and of a CPU's quantised bundle the joined one; what the manifest says."""
    for name, graph in graphs.items():
        stage.write_bytes(stage.named(f"{name}.onnx"), graph_bytes(graph))
    is_packed = options.plan is not None and find_target(options.target).release is None
    return write_joined(stage, graphs) if is_packed else {}


def _text(source: Described, options: ExportOptions) -> CalibrationText | None:
    """That of `options.calibrate`, or what finds scales without; refused before the work begins."""
    if options.calibrate is None and options.store is not STATIC:
        return None
    if options.store is STATIC:
        require_static(source.config)
    return calibration_text(options.calibrate, source.folder, source.config)


def _find_scales(
    config: MlaConfig,
    weights: WeightMap | BundleSource,
    options: ExportOptions,
    layout: WeightLayout,
    *,
    text: CalibrationText | None,
    report: Progress,
) -> None:
    """Give the layout the scales of latents in static codes, where they are that."""
    if options.store is STATIC and text is not None:
        stored = DTYPES[options.dtype]
        layout.latent_scales = latent_scales(config, weights.read_parameter, text, stored, report)


def _calibrate(
    config: MlaConfig,
    weights: WeightMap | BundleSource,
    options: ExportOptions,
    layout: WeightLayout,
    *,
    text: CalibrationText | None,
    report: Progress,
) -> None:
    """Fit the rounding of the layout's weights to `text`, where there is one."""
    if options.plan is None or options.calibrate is None or text is None:
        return
    is_for_device = find_target(options.target).release is not None
    rounding = PlanRounding.of(config, options.plan, options.dtype, for_device=is_for_device)
    found = calibrate(config, weights.read_parameter, layout, rounding, text=text, report=report)
    layout.calibration = found.to_dict()
    if found.scaled is not None:
        layout.calibration["scaled_by"] = dict(layout.scales.readers)


def _require_fired(graphs: dict[str, Assembled], trace: Trace) -> None:
    """Each composite that was traced is lowered once, and attention is where the latent is."""
    found: Counter[str] = Counter()
    for traced in trace.layers:
        for node in traced.model.graph:
            found[node.op_type] += len(traced.kind.indices)
    attention = sum(
        len(call.reads) + sum(part.kind == "latent" for part in call.parts) for call in trace.calls
    )
    both = {
        "lower_cache_update": found["CacheUpdate"],
        "lower_quantized_update": found["QuantizedUpdate"],
        "lower_static_update": found["StaticUpdate"],
        "lower_ring_update": found["RingUpdate"],
        "lower_experts": found["MoE"],
        "lower_delta_attention": found["DeltaAttention"],
        "lower_conv_state": found["ConvState"],
    }
    order.require_counts(graphs["prefill"].counts, {"lower_expanded_attention": attention, **both})
    order.require_counts(
        graphs["decode"].counts,
        {"absorb_projections": attention, "lower_latent_attention": attention, **both},
    )


def _most_heads(config: MlaConfig) -> int:
    """The most numbers per cached token that scores of any layer or indexer hold."""
    keys = ("index_n_heads", "swa_num_attention_heads")
    return max(config.num_heads, *(int(config.raw.get(key) or 0) for key in keys))


def widest_row(trace: Trace) -> int:
    """The most numbers that one cache keeps of a token."""
    rows = (buffer.parts for buffer in trace.all_buffers if not buffer.is_state)
    return max(sum(part.shape[0] for part in parts) for parts in rows)


def write_weights(
    weights: WeightSource, layout: WeightLayout, stage: Stage, report: Progress
) -> None:
    """The bundle's weight file, with progress."""
    written, total = 0, layout.total_bytes

    def done(count: int) -> None:
        nonlocal written
        written += count
        report("weights", written, total)

    with stage.create(stage.named("weights")) as stream:
        layout.write(stream, weights, done)


def copy_texts(source: Path, stage: Stage, names: Sequence[str]) -> None:
    """Files of the folder `source` as they are, if they are there; none is interpreted here."""
    with open_folder(source) as folder:
        present = set(folder.names())
        for name in names:
            if name in present:
                text = folder.read_bytes(name, policy="checkpoint", max_bytes=_COPY_LIMIT)
                stage.write_bytes(name, text)
