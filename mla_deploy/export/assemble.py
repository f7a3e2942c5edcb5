"""One graph from the trace: the trunk, with each layer a call of its kind's function.

A layer kind is one ONNX model-local function whose weights are arguments, so a graph holds the
nodes of each kind once and one call for each layer: it does not grow with depth. Initializers are
external data, byte ranges of the weight file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common as common_passes

from mla_deploy import shapes
from mla_deploy.config import MlaConfig
from mla_deploy.errors import InputError, MlaDeployError
from mla_deploy.export import bind
from mla_deploy.export.logits import name_logits
from mla_deploy.export.onnx_program import own_copy
from mla_deploy.export.static_scales import LatentScales
from mla_deploy.export.trace import Trace
from mla_deploy.export.trace_layer import CacheForm, TracedLayer
from mla_deploy.export.trace_trunk import INPUTS, frequency_names
from mla_deploy.export.value_types import forget_types
from mla_deploy.export.weights import (
    WEIGHT_FILE,
    StoredWeight,
    WeightLayout,
    full_use,
    renamed_use,
    stored_dtype,
    stored_name,
)
from mla_deploy.rewrite import order
from mla_deploy.rewrite.quantized_weight import DTYPES as IR_DTYPES
from mla_deploy.rewrite.rule import DOMAIN
from mla_deploy.rewrite.weights import WeightUse, collect_weights
from mla_deploy.source.cache_parts import CacheBuffer
from mla_deploy.source.probe import BATCH, NEW
from mla_deploy.weight_forms.form import WeightPlan

OPSET = 23  # RMSNormalization; every other operator means the same since the trace's opset
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class GraphForm:
    """What both graphs of a bundle have in common."""

    config: MlaConfig
    cache: CacheForm
    dtype: str  # of weights
    cache_dtype: str  # of cached rows, but for latents that are codes
    all_logits: bool
    layers_prefix: str
    builder: type[Builder]
    plan: WeightPlan | None = None
    scales: LatentScales | None = None  # of static codes


@dataclass
class Assembled:
    """A graph, and how often each rewrite rule fired in it, layers counted one by one."""

    model: ir.Model
    counts: dict[str, int]


def assemble(
    trace: Trace, form: GraphForm, rules: order.GraphRules, layout: WeightLayout
) -> Assembled:
    """Rewrite the trunk and each layer kind with `rules`, and put the graph together.

    `layout` learns the weights; `bind.bind_weights` later gives them their bytes.
    """
    trunk = own_copy(trace.trunk)
    counts = order.apply_rules(trunk, (*rules.head, *rules.trunk))
    uses = collect_weights(trunk, {*INPUTS, *frequency_names(trace.rope)})
    builder = form.builder(trunk, form, layout, trace)
    builder.trunk_weights({k: renamed_use(u, "model.") for k, u in uses.items()})
    for traced in trace.layers:
        fired = builder.kind(traced, rules.layers)
        for rule, number in fired.items():
            counts[rule] = counts.get(rule, 0) + number * len(traced.kind.indices)
    builder.inputs_and_outputs(rules.verified)
    return Assembled(builder.finished(), counts)


class Builder:
    """The graph of ONNX Runtime: weights in half precision are widened, arithmetic is fp32."""

    opset = OPSET
    ir_version = 11

    def __init__(
        self, trunk: ir.Model, form: GraphForm, layout: WeightLayout, trace: Trace
    ) -> None:
        self.model = trunk
        self.form = form
        self.layout = layout
        self.trace = trace
        self.dtype = IR_DTYPES[form.dtype]
        self.calls: dict[int, ir.Node] = {
            int(node.attributes["index"].value): node
            for node in trunk.graph
            if node.op_type == "DecoderLayer"
        }
        self.cache_inputs: dict[str, ir.Value] = {}
        self.cache_outputs: dict[str, ir.Value] = {}

    def trunk_weights(self, uses: dict[str, WeightUse]) -> None:
        """Weights of the trunk: inputs of its graph become initializers."""
        graph = self.model.graph
        by_name = {str(v.name): v for v in graph.inputs}
        for name, use in uses.items():
            value = by_name[name]
            graph.inputs.remove(value)
            stored = self._weight(full_use(use, "", self.trace.tied), _static_shape(value))
            value.replace_all_uses_with(self.read_weight(stored, value))
        self.type_trunk()

    def kind(self, traced: TracedLayer, rules: order.Rules) -> dict[str, int]:
        """Rewrite one layer kind, add its function, and call it for each of its layers."""
        layer = own_copy(traced.model)
        first = traced.kind.indices[0]
        held = [*self.trace.buffers(first), *traced.shared]
        self.type_caches(layer.graph, traced, held)
        counts = order.apply_rules(layer, rules)
        given = [*traced.inputs, *traced.held, *self.step_inputs(layer.graph)]
        uses = collect_weights(layer, set(given))
        order.require_lowered(layer)
        by_name = {str(v.name): v for v in layer.graph.inputs}
        weights = []
        for index in traced.kind.indices:
            prefix = f"{self.form.layers_prefix}.{index}."
            weights.append(
                [
                    self._weight(
                        full_use(renamed_use(use, "layer."), prefix, self.trace.tied),
                        _static_shape(by_name[name]),
                    )
                    for name, use in uses.items()
                ]
            )
        formal = [by_name[n] for n in given] + [by_name[n] for n in uses]
        arguments = dict(zip(formal[len(given) :], weights[0], strict=True))
        self.type_layer(layer, traced, held, arguments)
        self._add_function(traced.kind.name, layer, formal)
        extra = given[len(traced.inputs) + len(traced.held) :]
        for index, stored in zip(traced.kind.indices, weights, strict=True):
            self._call(traced, index, [*(self.step_value(n, index) for n in extra), *stored])
        return counts

    def type_caches(
        self, graph: ir.Graph, traced: TracedLayer, held: Sequence[CacheBuffer]
    ) -> None:
        """Before rules run: caches have the dtype that they are stored in."""
        buffers = dict(zip(traced.held, held, strict=True))
        for value in graph.inputs:
            if value.name in buffers:
                value.type = ir.TensorType(self.cache_dtype(buffers[str(value.name)]))

    def cache_dtype(self, buffer: CacheBuffer) -> ir.DataType:
        """A state is fp32 whatever the cache is."""
        if buffer.is_state:
            return ir.DataType.FLOAT
        return IR_DTYPES[buffer.stored or self.form.cache_dtype]

    def step_inputs(self, graph: ir.Graph) -> tuple[str, ...]:
        """What a layer reads of the call beside the traced plan."""
        return ()

    def step_value(self, name: str, layer: int) -> ir.Value:
        """The trunk's value for one of `step_inputs`."""
        raise MlaDeployError("EXP-SHAPE", f"a layer reads {name}, which the call does not give")

    def type_layer(
        self,
        layer: ir.Model,
        traced: TracedLayer,
        held: Sequence[CacheBuffer],
        arguments: Mapping[ir.Value, ir.Value],
    ) -> None:
        """After rules ran; `arguments` gives the stored weight of each formal one."""
        graph = layer.graph
        for value, weight in arguments.items():
            if weight.dtype in _HALVES:
                cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT})
                value.replace_all_uses_with(cast.outputs[0])
                cast.replace_input_with(0, value)
                graph.insert_before(graph[0], cast)

    def inputs_and_outputs(self, verified: bool) -> None:
        """Name and type the graph's contract: lengths, tokens, caches, logits."""
        graph = self.model.graph
        by_name = {str(v.name): v for v in graph.inputs}
        sets = [t for table in self.trace.rope.values() for t in table.sets]
        for name, table in zip(frequency_names(self.trace.rope), sets, strict=True):
            value = by_name[name]
            graph.inputs.remove(value)
            value.const_value = ir.tensor(table.numpy(), name=name)
            graph.register_initializer(value)
        self._bind_row_count(by_name["rows_held"])
        batch, new = shapes.BATCH, shapes.NEW_TOKENS
        by_name["input_ids"].shape = ir.Shape([batch, new])
        by_name["cache_lengths"].shape = ir.Shape([batch])
        by_name["new_lengths"].shape = ir.Shape([batch])
        vocab, every = self.form.config.vocab_size, self.form.all_logits
        behind = name_logits(graph, vocab, every=every, verified=verified)
        for buffer in self.trace.all_buffers:
            graph.inputs.append(self.cache_inputs[buffer.name()])
            graph.outputs.append(self.cache_outputs[buffer.name(out=True)])
        graph.outputs.extend(behind)

    def _bind_row_count(self, rows_held: ir.Value) -> None:
        """How many rows are bound is read off a cache that has a row for every token."""
        graph = self.model.graph
        graph.inputs.remove(rows_held)
        whole = [b for b in self.trace.all_buffers if not b.is_state and b.window is None]
        if whole:
            rows_held.replace_all_uses_with(self.cache_inputs[whole[0].name()])
        elif rows_held.uses():
            told = "every layer keeps a sliding window, and the model class attends to every token"
            hint = "set sliding_window to null in config.json if it does attend to every token"
            raise InputError("EXP-ROWS", f"{told}; wanted one or the other", hint=hint)

    def finished(self) -> ir.Model:
        model = self.model
        common_passes.RemoveUnusedNodesPass()(model)
        common_passes.ClearMetadataAndDocStringPass()(model)
        forget_types(model)
        model.graph.name = "mla_deploy"
        for function in model.functions.values():
            model.graph.opset_imports.update(function.opset_imports)
        # In one order: rules add domains as a set of them comes.
        opsets = sorted({**model.graph.opset_imports, "": self.opset, DOMAIN: 1}.items())
        model.graph.opset_imports.clear()
        model.graph.opset_imports.update(opsets)
        model.ir_version = self.ir_version
        model.producer_name = "mla-deploy"
        return model

    def _weight(self, use: WeightUse, shape: tuple[int, ...]) -> ir.Value:
        """The initializer of a weight: bytes of the weight file, or a constant of the class."""
        constant = self.trace.constants.get(use.parameter)
        if constant is not None:
            return self._initializer(ir.tensor(constant.numpy(), name=use.parameter))
        name, is_view = stored_name(use), False
        if use.part is None:
            weight = StoredWeight(name, use, shape, self._stored_dtype(shape))
        else:
            weight, is_view = bind.stored_part(name, use, shape)
        self.layout.add(weight)
        # Offsets are known once every weight is; until then the place in the file is held empty.
        place = ir.ExternalTensor(
            WEIGHT_FILE,
            0,
            weight.nbytes,
            IR_DTYPES[weight.dtype],
            shape=ir.Shape(shape),
            name=name + bind.ROWS_VIEW if is_view else name,
        )
        return self._initializer(place)

    def _stored_dtype(self, shape: tuple[int, ...]) -> str:
        return stored_dtype(shape, self.form.config.router_rows, self.form.dtype)

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        graph = self.model.graph
        name = str(tensor.name)
        if name not in graph.initializers:
            kind = ir.TensorType(tensor.dtype)
            shape = ir.Shape(tensor.shape.numpy())
            graph.register_initializer(
                ir.Value(name=name, shape=shape, type=kind, const_value=tensor)
            )
        return graph.initializers[name]

    def type_module_caches(self, caches: Mapping[str, CacheBuffer]) -> None:
        """Before rules run on a graph without layers: its caches as they are stored."""
        for value in self.model.graph.inputs:
            buffer = caches.get(str(value.name))
            if buffer is not None:
                value.type = ir.TensorType(self.cache_dtype(buffer))

    def bind_step_inputs(self) -> None:
        """In a graph without layers: what rules ask for beside the traced plan."""

    def type_trunk(self) -> None:
        """After the trunk's weights are known, and before any layer is called."""

    def read_weight(self, stored: ir.Value, like: ir.Value) -> ir.Value:
        """The stored weight in fp32; an embedding is widened after the rows are gathered."""
        if stored.dtype not in _HALVES:
            return stored
        graph = self.model.graph
        uses = list(like.uses())
        if len(uses) == 1 and uses[0][0].op_type == "Gather":
            gather = uses[0][0]
            out = gather.outputs[0]
            cast = ir.node("Cast", [out], attributes={"to": ir.DataType.FLOAT})
            out.replace_all_uses_with(cast.outputs[0])
            cast.replace_input_with(0, out)
            graph.insert_after(gather, cast)
            return stored
        cast = ir.node("Cast", [stored], attributes={"to": ir.DataType.FLOAT})
        graph.insert_before(graph[0], cast)
        return cast.outputs[0]

    def _add_function(self, name: str, layer: ir.Model, formal: list[ir.Value]) -> None:
        graph = layer.graph
        for initializer in list(graph.initializers.values()):
            node = ir.node("Constant", [], attributes={"value": initializer.const_value})
            initializer.replace_all_uses_with(node.outputs[0])
            graph.insert_before(graph[0], node)
        for place, value in enumerate(graph.outputs):
            if value.producer() is None:  # handed through: a function gives only what it makes
                node = ir.node("Identity", [value])
                graph.append(node)
                graph.outputs[place] = node.outputs[0]
        outputs = list(graph.outputs)
        nodes = list(graph)
        graph.outputs.clear()
        graph.inputs.clear()
        graph.remove(nodes)
        for value in formal:
            value.const_value = None
        opsets = dict(sorted({**graph.opset_imports, "": self.opset, DOMAIN: 1}.items()))
        body = ir.Graph(formal, outputs, nodes=nodes, opset_imports=opsets, name=name)
        function = ir.Function(DOMAIN, name, graph=body, attributes=[])
        self.model.functions[function.identifier()] = function

    def _call(self, traced: TracedLayer, index: int, rest: list[ir.Value]) -> None:
        """`rest`: what comes behind the caches, the layer's weights last."""
        opaque = self.calls[index]
        graph = self.model.graph
        own, made = self.trace.buffers(index), self.trace.calls[index]
        given = [self._cache_value(buffer, out=False) for buffer in own]
        updated = [self._cache_value(buffer, out=True) for buffer in own]
        shared = [self._cache_value(b, out=True) for b in self.trace.shared_buffers(index)]
        results = [
            ir.Value(
                name=f"layer.{index}.{place}",
                type=value.type,
                shape=_given_shape(made.output_shapes[place], made.output_dtypes[place]),
            )
            for place, value in enumerate(opaque.outputs)
        ]
        call = ir.Node(
            DOMAIN,
            traced.kind.name,
            [*opaque.inputs, *given, *shared, *rest],
            outputs=[*results, *updated],
            name=f"layer.{index}",
        )
        graph.insert_after(opaque, call)
        for old, new in zip(opaque.outputs, results, strict=True):
            old.replace_all_uses_with(new)
        graph.remove(opaque, safe=True)

    def _cache_value(self, buffer: CacheBuffer, *, out: bool) -> ir.Value:
        known = self.cache_outputs if out else self.cache_inputs
        if buffer.name(out=out) in known:
            return known[buffer.name(out=out)]
        shape: list[Any] = [shapes.BATCH, *buffer.shape]
        if not buffer.is_state:
            shape[1:1] = [1, buffer.window or self.rows(out)]
        value = ir.Value(
            name=buffer.name(out=out),
            shape=ir.Shape(shape),
            type=ir.TensorType(self.cache_dtype(buffer)),
        )
        known[buffer.name(out=out)] = value
        return value

    def rows(self, out: bool) -> str | int:
        """The cached-token axis of a cache that has a row for each."""
        if not self.form.cache.growing:
            return shapes.CAPACITY
        return f"{shapes.PAST_TOKENS} + {shapes.NEW_TOKENS}" if out else shapes.PAST_TOKENS


def _given_shape(shape: tuple[int, ...], dtype: torch.dtype) -> ir.Shape:
    """The shape of what a layer gives back: rows, new tokens, and sizes of the model."""
    if shape[:2] != (BATCH, NEW):
        raise MlaDeployError("EXP-SHAPE", f"a layer gives back {shape}, wanted [rows, new tokens]")
    # Positions of chosen tokens are as many as are cached, up to what the model chooses.
    widths = shape[2:] if dtype.is_floating_point else ("chosen_tokens",)
    return ir.Shape([shapes.BATCH, shapes.NEW_TOKENS, *widths])


def _static_shape(value: ir.Value) -> tuple[int, ...]:
    return tuple(size for size in value.shape or () if isinstance(size, int))
