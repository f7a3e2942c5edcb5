"""`export --module`: a user's own nn.Module, raised, to a published bundle."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from mla_deploy.bundle import Bundle, Stage, refuse_overlap, stage_bundle
from mla_deploy.config import MlaConfig
from mla_deploy.errors import InputError, quoted
from mla_deploy.export.lowered import finish_tensorrt, trunk_lowering
from mla_deploy.export.manifest import manifest_of
from mla_deploy.export.options import ExportOptions
from mla_deploy.export.pipeline import TOKENIZER_TEXTS, Progress, copy_texts
from mla_deploy.export.trace_layer import CacheForm
from mla_deploy.export.trace_module import EXPANSION, trace_raised
from mla_deploy.export.trunk_bundle import TrunkBundle
from mla_deploy.export.weights import DTYPES
from mla_deploy.source.user.module_source import ModuleSource, open_module_source
from mla_deploy.source.user.raised import RaisedModule
from mla_deploy.targets import find_target


@dataclass(frozen=True)
class ModuleWeights:
    """The weights of a raised module, by the names that its graphs have for them."""

    raised: RaisedModule
    skipped: Mapping[str, int]

    @cached_property
    def slices(self) -> Mapping[str, torch.Tensor]:
        """What has a shape, by name."""
        module = self.raised.source.module
        named = {**dict(module.named_parameters(remove_duplicate=False)),
                 **dict(module.named_buffers(remove_duplicate=False))}  # fmt: skip
        for index, latent in enumerate(self.raised.latents):
            named[f"{EXPANSION}.{index}.w_kv_b"] = latent.w_kv_b
        return named

    def read(self, name: str) -> torch.Tensor:
        """A weight. Raises: InputError CKPT-NONFINITE."""
        return _finite(self.slices[name].detach(), name)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a weight. Raises: InputError CKPT-NONFINITE."""
        return _finite(self.slices[name].detach()[start:stop], name)

    def stacked_parts(self, name: str) -> tuple[str, ...]:
        """None: a module's experts are its own parameters."""
        return ()


def _finite(value: torch.Tensor, name: str) -> torch.Tensor:
    if not bool(value.isfinite().all()):
        raise InputError("CKPT-NONFINITE", f"{quoted(name)} holds NaN or infinity", tensor=name)
    return value


def export_module(
    names: tuple[str, str | os.PathLike[str] | None],
    out: str | os.PathLike[str],
    options_of: Callable[[MlaConfig], ExportOptions],
    *,
    replace: bool,
    report: Progress,
) -> Bundle:
    """Publish the bundle of the module that `names`, a factory and a weight file, stand for.

    A tokenizer's files beside the weight file come along.
    Raises: SRC-*, CKPT-*, EXP-*, BUN-*, REW-*.
    """
    factory, weights = names
    report("trace", 0, 2)
    source = open_module_source(factory, weights)
    options = options_of(source.config)
    _require_form(options)
    report("trace", 1, 2)
    if weights is not None:
        refuse_overlap(out, weights)
    needed = source.total_bytes * DTYPES[options.dtype].itemsize // 4
    with stage_bundle(out, replace=replace, needed_bytes=needed) as stage:
        if weights is not None:
            copy_texts(Path(weights).parent, stage, TOKENIZER_TEXTS)
        return _build(source, stage, options, report)


def _require_form(options: ExportOptions) -> None:
    if options.store is not None:
        raise InputError(
            "EXP-CACHE",
            f"the cache of a module is stored as {options.cache_dtype}; wanted fp32, fp16 or bf16",
            hint="leave --cache-dtype out, or store the cache as fp16",
        )
    if options.rotate_latent:
        raise InputError(
            "EXP-ROTATE",
            "the latent of a module cannot be rotated: nothing names the weights around it; wanted "
            "a checkpoint",
            hint="leave --rotate-latent out, or rotate inside the module",
        )


def _build(source: ModuleSource, stage: Stage, options: ExportOptions, report: Progress) -> Bundle:
    cache = CacheForm(options.cache_layout == "fused", options.cache == "growing")
    trace = trace_raised(source.raised, cache, options.all_logits)
    report("trace", 2, 2)
    made = TrunkBundle(trace, source.config, options, len(source.raised.latents))
    graphs = made.assembled(trunk_lowering(trace, options))
    release = find_target(options.target).release
    if release is not None:
        finish_tensorrt(graphs, release)
    made.require_fired(graphs)
    report("rewrite", 1, 1)
    weights = ModuleWeights(source.raised, {})
    made.write(graphs, weights, stage, report)
    report("publish", 0, 1)
    manifest = manifest_of(
        source, options, trace, graphs, layout=made.layout, weights=weights, named=stage.named
    )
    bundle = stage.publish(manifest)
    report("publish", 1, 1)
    return bundle
