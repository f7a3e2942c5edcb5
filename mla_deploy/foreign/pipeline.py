"""`rewrite`: the whole way from somebody else's ONNX file to a published bundle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from mla_deploy.bundle import Bundle, Stage, stage_bundle
from mla_deploy.bundle.output import check_output, output_path
from mla_deploy.config import MlaConfig
from mla_deploy.errors import InputError, quoted
from mla_deploy.export.manifest import manifest_of
from mla_deploy.export.options import DEFAULT_CAPACITY, ExportOptions, check_options
from mla_deploy.export.pipeline import TOKENIZER_TEXTS, Progress, copy_texts
from mla_deploy.export.trace_layer import CacheForm
from mla_deploy.export.trunk_bundle import TrunkBundle
from mla_deploy.export.weights import DTYPES
from mla_deploy.foreign.by_place import switches
from mla_deploy.foreign.facts import foreign_facts
from mla_deploy.foreign.graph import ForeignGraph
from mla_deploy.foreign.lowering import finish_foreign, foreign_lowering, runnable
from mla_deploy.foreign.prove import (
    Comparison,
    ForeignSession,
    OurGraphs,
    Proof,
    cache_pairs,
    opened_session,
    proof_of,
    require_proof,
)
from mla_deploy.foreign.read import ForeignFile, open_foreign
from mla_deploy.foreign.recognise import Recognition, recognise
from mla_deploy.foreign.region import Region
from mla_deploy.foreign.require import require_mla
from mla_deploy.foreign.trunk import RaisedForeign, raise_foreign
from mla_deploy.foreign.weights import ForeignWeights
from mla_deploy.targets import DEFAULT_TARGET, buildable_target, find_target

_IR_DTYPES = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
}


@dataclass(frozen=True)
class ForeignSource:
    """A foreign file as the source of a bundle."""

    digest: str
    config: MlaConfig
    files: tuple[str, ...]
    total_bytes: int
    notes: tuple[str, ...]


def rewrite_model(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    target: str | None = None,
    dtype: str | None = None,
    cache: str | None = None,
    cache_layout: str | None = None,
    cache_dtype: str | None = None,
    capacity: int | None = None,
    all_logits: bool = False,
    replace: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Rewrite an ONNX model that another exporter wrote: latent cache, absorbed projections.

    The bundle has the graph I/O of every bundle; options are those of `export`. MLA is found by
    what the graph computes. Before anything is published the original and the rewritten graphs
    answer the same random tokens, prefill and decode steps; their difference is in the manifest.
    `dtype` None: weights stay in the dtype that they have, and what is cached in the one that the
    graph computes it in. A TensorRT target has one dtype for both, its default where it lacks that
    of the weights; its graphs are compared as ONNX Runtime runs them, no engine is built.
    A tokenizer's files beside the model come along.

    Raises: InputError ONNX-*, REW-INPUT, REW-FIXED, REW-NO-MLA, REW-LAYER (which tells per layer
    where the recognition stopped), REW-POSITION, REW-TARGET, EXP-*, TARGET-*,
    CKPT-NONFINITE; GateError REW-PROOF; IncompatibleError REW-SESSION; BUN-*, ENV-*.
    """
    report = progress or (lambda *_: None)
    _refuse_over_source(path, out)
    check_output(output_path(out), replace=replace)  # before the graph is read
    with open_foreign(path) as file:
        report("recognise", 0, 1)
        recognition = recognise(file.model)
        require_mla(recognition)
        report("recognise", 1, 1)
        options = _options(
            target=target,
            dtype=dtype,
            as_found=(weights_dtype(file.model), rows_dtype(recognition)),
            cache=cache,
            cache_layout=cache_layout,
            cache_dtype=cache_dtype,
            capacity=_capacity(recognition) if capacity is None else capacity,
            all_logits=all_logits,
        )
        needed = file.total_bytes * DTYPES[options.dtype].itemsize // 2
        with stage_bundle(out, replace=replace, needed_bytes=needed) as stage:
            copy_texts(file.folder, stage, TOKENIZER_TEXTS)
            return _build(file, recognition, stage, options, report)


def _refuse_over_source(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """A bundle may stand beside the model, but not in the place of its folder."""
    model, target = Path(os.path.realpath(path)), Path(os.path.realpath(out))
    if target == model or target in model.parents:
        raise InputError(
            "BUN-OVERLAP",
            f"the output {quoted(target)} holds the model {quoted(model.name)}",
            hint="choose an output beside the model",
        )


def _options(**chosen: Any) -> ExportOptions:
    """What is asked for; what is not follows the graph as far as the target lets it."""
    row = buildable_target(chosen["target"] or DEFAULT_TARGET)
    found, rows = chosen["as_found"]
    as_found = found if found in row.dtypes else row.default_dtype
    stored = chosen["dtype"] or as_found
    if chosen["dtype"] is not None or row.release is not None:
        rows = None
    cache_dtype = chosen["cache_dtype"] or rows or stored
    options = ExportOptions(
        target=row.name,
        dtype=stored,
        cache=chosen["cache"] or "in-place",
        cache_layout=chosen["cache_layout"] or "fused",
        cache_dtype=cache_dtype,
        capacity=chosen["capacity"],
        all_logits=chosen["all_logits"],
        in_place=False,
        weights=None,
    )
    check_options(options)
    if options.store is not None:
        raise InputError(
            "EXP-CACHE",
            f"the cache of a rewritten graph is stored as {cache_dtype}; wanted fp32, fp16 or bf16",
            hint="leave --cache-dtype out, or store the cache as fp16",
        )
    return options


def _build(
    file: ForeignFile,
    recognition: Recognition,
    stage: Stage,
    options: ExportOptions,
    report: Progress,
) -> Bundle:
    opset = _opset(file.model)
    report("original", 0, 1)
    comparison = compared_with(file, recognition)
    report("original", 1, 1)
    dtype = weights_dtype(file.model)
    cache = CacheForm(options.cache_layout == "fused", options.cache == "growing")
    config, notes = foreign_facts(recognition), switches(Region(recognition.graph))
    raised = raise_foreign(recognition, cache, options.all_logits, dtype)
    source = foreign_source(file, config, notes)
    made = TrunkBundle(raised.trace, config, options, len(raised.latents))
    graphs = made.assembled(foreign_lowering(raised.trace, options, opset))
    finish_foreign(graphs, options)
    made.require_fired(graphs)
    report("rewrite", 1, 1)
    weights = ForeignWeights(raised.weights)
    protos = made.write(graphs, weights, stage, report)
    report("proof", 0, 1)
    proof = _proven(comparison, protos, stage, (raised, options))
    report("proof", 1, 1)
    manifest = manifest_of(
        source,
        options,
        raised.trace,
        graphs,
        layout=made.layout,
        weights=weights,
        named=stage.named,
    )
    manifest["rewritten"] = {
        "proof": proof.to_dict(),
        "opset": opset,
        "cached_before": cached_bytes(recognition.graph),
    }
    return stage.publish(manifest)


def compared_with(file: ForeignFile, recognition: Recognition) -> Comparison:
    """What the foreign graph says of random tokens. Raises: IncompatibleError REW-SESSION."""
    graph = recognition.graph
    pairs = cache_pairs(graph)
    if len(pairs) != len(graph.caches):
        raise InputError(
            "REW-INPUT",
            f"{len(graph.caches) - len(pairs)} of {len(graph.caches)} cache inputs go on as no "
            "output",
            hint="export the model with its present keys and values as outputs",
        )
    with opened_session(file.proto, file.folder, "REW-SESSION") as session:
        return Comparison(ForeignSession(graph, session, pairs))


def _proven(
    comparison: Comparison,
    protos: Mapping[str, onnx.ModelProto],
    stage: Stage,
    made: tuple[RaisedForeign, ExportOptions],
) -> Proof:
    raised, options = made
    kind = _IR_DTYPES[options.rows_dtype]
    caches = {
        buffer.name(): (buffer.shape[0], np.dtype(kind.numpy()))
        for buffer in raised.trace.trunk_buffers
    }
    on_device = find_target(options.target).release is not None
    ours = OurGraphs(
        prefill=runnable(protos["prefill"], on_device),
        decode=runnable(protos["decode"], on_device),
        folder=stage.path,
        caches=caches,
        unused=0.0 if on_device else np.nan,
    )
    wanted, found = comparison.against(ours)
    dtypes = (options.dtype, options.rows_dtype, raised.dtype)
    loosest = max(dtypes, key=("fp32", "fp16", "bf16").index)
    proof = proof_of(wanted, found, loosest)
    require_proof(proof)
    return proof


def cached_bytes(graph: ForeignGraph) -> int:
    """Bytes a token that the foreign graph keeps in its own caches."""
    total = 0
    for value in graph.caches:
        sizes = [axis for axis in graph.axes(value) or () if isinstance(axis, int)]
        total += int(prod(sizes) * (value.dtype or ir.DataType.FLOAT).itemsize)
    return total


def rows_dtype(recognition: Recognition) -> str | None:
    """The dtype that the first layer's latent is computed in; None where it cannot be told."""
    latent = next(layer.latent for layer in recognition.layers if layer.latent is not None)
    kind = recognition.graph.known.dtypes.get(latent.rows[0])
    return next((name for name, each in _IR_DTYPES.items() if each == kind), None)


def _capacity(recognition: Recognition) -> int:
    most = recognition.graph.most_tokens
    return DEFAULT_CAPACITY if most is None else min(most, DEFAULT_CAPACITY)


def weights_dtype(model: ir.Model) -> str:
    """The dtype that most numbers of a model's weights are stored in."""
    counts = dict.fromkeys(_IR_DTYPES, 0)
    for value in model.graph.initializers.values():
        for name, dtype in _IR_DTYPES.items():
            if value.const_value is not None and value.const_value.dtype == dtype:
                counts[name] += int(prod(value.const_value.shape.numpy()))
    return max(counts, key=lambda name: counts[name])


def foreign_source(
    file: ForeignFile, config: MlaConfig, notes: tuple[str, ...] = ()
) -> ForeignSource:
    """The file as a manifest tells of it."""
    producer = " ".join(filter(None, (file.model.producer_name, file.model.producer_version)))
    return ForeignSource(
        digest=file.digest(),
        config=config,
        files=file.files,
        total_bytes=file.total_bytes,
        notes=(f"rewritten from an ONNX graph of {quoted(producer or 'unknown')}", *notes),
    )


def _opset(model: ir.Model) -> int:
    return int(model.graph.opset_imports.get("", 0))
