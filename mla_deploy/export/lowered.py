"""The two graphs of a bundle, lowered for its target: what a target asks of rules and assembly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from mla_deploy import shapes
from mla_deploy.config import MlaConfig
from mla_deploy.errors import InputError, MlaDeployError
from mla_deploy.export.assemble import Assembled, Builder, GraphForm, assemble
from mla_deploy.export.assemble_typed import typed_builder
from mla_deploy.export.trace import Trace
from mla_deploy.export.weights import WeightLayout
from mla_deploy.latent_store import STATIC
from mla_deploy.rewrite import mla_decode, mla_decode_body, order, quantize_cpu, quantize_heads
from mla_deploy.rewrite.release import (
    Release,
    composites_of,
    require_composites,
    require_operators,
)
from mla_deploy.rewrite.releases import find_release
from mla_deploy.targets import find_target
from mla_deploy.weight_forms.form import WeightPlan

if TYPE_CHECKING:
    from mla_deploy.export.options import ExportOptions


@dataclass(frozen=True)
class Lowering:
    """The rules of each graph, and who puts a graph together."""

    graphs: dict[str, order.GraphRules]
    builder: type[Builder]


def require_form(options: ExportOptions) -> None:
    """Raises: InputError TARGET-FORM for what no TensorRT target has."""
    target = find_target(options.target)
    is_static = options.store is STATIC
    if target.release is None:
        if is_static:
            raise InputError(
                "TARGET-FORM",
                f"target {target.name} takes no --cache-dtype {STATIC.name}, whose scales are "
                "constants of an engine; wanted one of its own",
                hint="store the cache as int8, whose scales follow each token",
                target=target.name,
            )
        return
    refused = {
        "--in-place": options.in_place,
        "--cache growing": options.cache == "growing",
        "--cache-layout split": options.cache_layout == "split" and not is_static,
        "--cache-layout fused": options.cache_layout == "fused" and is_static,
        "--weights keep": options.weights == "keep",
        f"--cache-dtype other than --dtype or {STATIC.name}": options.cache_dtype != options.dtype
        and not is_static,
    }
    asked = [name for name, wanted in refused.items() if wanted]
    if asked:
        hint = "leave the option out"
        if options.cache_by_config:
            hint = f"latent_cache_dtype of config.json says so: add `--cache-dtype {options.dtype}`"
        raise InputError(
            "TARGET-FORM",
            f"target {target.name} takes no {', '.join(asked)}: {target.runtime} updates one fused "
            "cache of fixed capacity, with weights of the bundle's own",
            hint=f"{hint}, or export with `--target cpu`",
            target=target.name,
            options=asked,
        )


def lowered(
    trace: Trace, config: MlaConfig, options: ExportOptions, layout: WeightLayout
) -> dict[str, Assembled]:
    """`prefill` and `decode`, over one weight file; `layout` learns its weights.

    Raises: InputError REW-TARGET, MlaDeployError REW-* and EXP-*.
    """
    release = find_target(options.target).release
    if release is None:
        graphs_of = cpu_rules(trace.form.growing, options.all_logits)
        if options.plan is not None:
            graphs_of = _quantized(graphs_of, options.plan, config, is_tied=bool(trace.tied))
        lowering = Lowering(graphs_of, Builder)
    else:
        found = composites_of(layer.model for layer in trace.layers)
        lowering = tensorrt_lowering(options, release, found)
    form = GraphForm(
        config=config,
        cache=trace.form,
        dtype=options.dtype,
        cache_dtype=options.rows_dtype,
        all_logits=options.all_logits,
        layers_prefix=trace.layers_prefix,
        builder=lowering.builder,
        plan=options.plan,
        scales=layout.latent_scales,
    )
    graphs = {name: assemble(trace, form, rules, layout) for name, rules in lowering.graphs.items()}
    if release is not None:
        finish_tensorrt(graphs, release)
    return graphs


def any_capacity(proto: onnx.ModelProto, capacity: int) -> onnx.ModelProto:
    """A copy in which a capacity that is a number is the word again; the graph reads it as a size.

    What a graph holds per cached token can be counted in it.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for value in [*copy.graph.input, *copy.graph.output]:
        dims = value.type.tensor_type.shape.dim
        if len(dims) == 4 and dims[2].dim_value == capacity:
            dims[2].dim_param = shapes.CAPACITY
    return copy


def cpu_rules(growing: bool, all_logits: bool) -> dict[str, order.GraphRules]:
    """The rules of ONNX Runtime's two graphs. Its decode graph checks several new tokens a row."""
    trunk = order.trunk_cpu()
    return {
        "prefill": order.GraphRules(trunk, order.prefill_cpu(growing)),
        "decode": order.GraphRules(trunk, order.decode_cpu(growing), verified=not all_logits),
    }


def _quantized(
    graphs: dict[str, order.GraphRules], plan: WeightPlan, config: MlaConfig, *, is_tied: bool
) -> dict[str, order.GraphRules]:
    """The same with quantised weights: linear layers before they become Gemm, the rest behind."""
    first = quantize_cpu.linear_rules(plan, config.router_rows)
    experts = quantize_cpu.expert_rules(plan, config.router_rows)
    trunk = quantize_cpu.trunk_rules(plan, config.hidden_size, tied=is_tied)
    halves = {
        "prefill": quantize_heads.expanded_rules(plan),
        "decode": quantize_heads.absorbed_rules(plan),
    }
    return {
        name: replace(
            rules,
            trunk=(*trunk, *rules.trunk),
            layers=(*first, *rules.layers, *experts, *halves[name]),
        )
        for name, rules in graphs.items()
    }


def tensorrt_lowering(options: ExportOptions, name: str, composites: set[str]) -> Lowering:
    """The rules of release `name`, for a model that holds `composites`. Raises: REW-TARGET."""
    release = find_release(name)
    require_composites(release, composites)
    builder = typed_builder(options.capacity, release.opset, release.ir_version)
    decode, trunk = release.decode, release.trunk
    blocks = mla_decode.blocks_of_a_wave(str(find_target(options.target).sm))
    place = [rule.name for rule in decode].index("lower_latent_attention")
    decode = (*decode[:place], *mla_decode.rules(blocks), *decode[place:])
    graphs = {
        "prefill": order.GraphRules(trunk, release.prefill),
        "decode": order.GraphRules(trunk, decode),
    }
    return Lowering(graphs, builder)


def trunk_lowering(trace: Trace, options: ExportOptions) -> Lowering:
    """Of a trace that is all trunk: a user's module, or another exporter's graph.

    Raises: InputError REW-TARGET.
    """
    release = find_target(options.target).release
    if release is None:
        return Lowering(cpu_rules(trace.form.growing, options.all_logits), Builder)
    # Rules of the head lower the tokens that it sees, for every runtime.
    found = composites_of(iter([trace.trunk])) - {"HeadTokens"}
    return tensorrt_lowering(options, release, found)


def finish_tensorrt(graphs: dict[str, Assembled], name: str) -> None:
    """Give decode its function of MlaDecode. Raises: REW-OPERATOR."""
    release = find_release(name)
    _as_operator(graphs["decode"], release)
    for graph in graphs.values():
        require_operators(release, graph.model)


def _as_operator(decode: Assembled, release: Release) -> None:
    """The function of MlaDecode; where the release has the override, at the top of the graph, where
    a plugin can take its place. Before that a plugin is found in layers, in a graph without it."""
    fired = decode.counts.get("to_mla_decode", 0)
    if fired:
        decode.counts["lower_latent_attention"] += fired
        decode.counts["lower_cache_update"] += fired
        mla_decode_body.add_tensorrt_body(
            decode.model, _stored(decode.model), in_place=release.has_tensor_scatter
        )
        if release.has_plugin_override:
            mla_decode_body.expose(decode.model)


def _stored(model: ir.Model) -> ir.DataType:
    """The dtype that latent caches are stored in."""
    dtypes = {v.dtype for v in model.graph.inputs if str(v.name).startswith("latent_cache.")}
    (dtype,) = dtypes
    if dtype is None:
        raise MlaDeployError("REW-TYPE", "the dtype of the caches is not known")
    return dtype
