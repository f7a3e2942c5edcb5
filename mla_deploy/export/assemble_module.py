"""One graph of a user's module: its trace is the graph, so only weights and names are bound."""

from __future__ import annotations

import onnx_ir as ir

from mla_deploy import shapes
from mla_deploy.export.assemble import Assembled, Builder, GraphForm
from mla_deploy.export.logits import name_logits
from mla_deploy.export.onnx_program import own_copy
from mla_deploy.export.trace import Trace
from mla_deploy.export.trace_module import INPUTS, SOURCE
from mla_deploy.export.weights import WeightLayout, renamed_use
from mla_deploy.rewrite import order
from mla_deploy.rewrite.weights import collect_weights


def assemble_module(
    trace: Trace, form: GraphForm, rules: order.GraphRules, layout: WeightLayout
) -> Assembled:
    """Rewrite the module's graph with `rules`; `layout` learns the weights."""
    model = own_copy(trace.trunk)
    caches = {buffer.name(): buffer for buffer in trace.trunk_buffers}
    builder = form.builder(model, form, layout, trace)
    builder.type_module_caches(caches)
    # All of it is trunk; the rules of layers do what the trunk's do, and more.
    counts = order.apply_rules(model, (*rules.head, *rules.layers))
    builder.bind_step_inputs()
    uses = collect_weights(model, {*INPUTS, *caches})
    order.require_lowered(model)
    builder.trunk_weights({name: renamed_use(use, f"{SOURCE}.") for name, use in uses.items()})
    _name(model, builder, rules.verified)
    return Assembled(builder.finished(), counts)


def _name(model: ir.Model, builder: Builder, verified: bool) -> None:
    """The graph's contract: tokens, lengths, caches; logits, then the caches."""
    graph, form, trace = model.graph, builder.form, builder.trace
    batch, new = shapes.BATCH, shapes.NEW_TOKENS
    inputs = {str(value.name): value for value in graph.inputs}
    inputs["input_ids"].shape = ir.Shape([batch, new])
    for name in INPUTS[1:]:
        inputs[name].shape = ir.Shape([batch])
    vocab, every = form.config.vocab_size, form.all_logits
    behind = name_logits(graph, vocab, every=every, verified=verified)
    for buffer, value in zip(trace.trunk_buffers, graph.outputs[1:], strict=True):
        held = inputs[buffer.name()]
        rows = (builder.rows(out=False), builder.rows(out=True))
        value.name = buffer.name(out=True)
        held.shape, value.shape = (ir.Shape([batch, 1, r, *buffer.shape]) for r in rows)
        value.type = held.type
    graph.outputs.extend(behind)
