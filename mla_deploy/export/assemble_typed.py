"""A graph for TensorRT: static capacity, and every value of the dtype that it is computed in.

Half-precision weights are read as they are stored. What a layer does not read of the plan is not
handed to it, so that the trunk computes nothing for nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common as common_passes

from mla_deploy.errors import MlaDeployError
from mla_deploy.export.assemble import Builder, GraphForm
from mla_deploy.export.dequantized import DequantizedWeights
from mla_deploy.export.trace import Trace
from mla_deploy.export.trace_layer import TracedLayer
from mla_deploy.export.weights import WeightLayout, full_use
from mla_deploy.rewrite.rule import DOMAIN
from mla_deploy.rewrite.step_inputs import LATENT_SCALE, lift_step_inputs
from mla_deploy.rewrite.strong_types import assign_types
from mla_deploy.rewrite.weights import WeightUse
from mla_deploy.source.cache_parts import CacheBuffer

_FLOAT = ir.DataType.FLOAT


class TypedBuilder(Builder):
    """`capacity`, `opset` and `ir_version` are set by `typed_builder`."""

    capacity = 0
    visible: ir.Value | None = None  # the plan's mask in the trunk

    def __init__(
        self, trunk: ir.Model, form: GraphForm, layout: WeightLayout, trace: Trace
    ) -> None:
        super().__init__(trunk, form, layout, trace)
        self.weights = DequantizedWeights(form, super()._weight)

    def trunk_weights(self, uses: dict[str, WeightUse]) -> None:
        by_name = {str(v.name): v for v in self.model.graph.inputs}
        for name, use in uses.items():
            if any(node.op_type == "Gather" for node, _ in by_name[name].uses()):
                self.weights.left.add(full_use(use, "", self.trace.tied).parameter)
        self.weights.role = "head"
        super().trunk_weights(uses)
        self.weights.role = None

    def _weight(self, use: WeightUse, shape: tuple[int, ...]) -> ir.Value:
        if use.parameter in self.trace.constants:
            return super()._weight(use, shape)
        return self.weights.value(use, shape, self.model.graph)

    def type_caches(
        self, graph: ir.Graph, traced: TracedLayer, held: Sequence[CacheBuffer]
    ) -> None:
        """Nothing yet: rules work on the fp32 of the trace."""

    def step_inputs(self, graph: ir.Graph) -> tuple[str, ...]:
        return lift_step_inputs(graph)

    def step_value(self, name: str, layer: int) -> ir.Value:
        """Made once, of the graph's length inputs. See `rewrite/step_inputs.py`."""
        if name == LATENT_SCALE:
            return self._latent_scale(layer)
        known = {str(v.name): v for v in self.model.graph}  # nodes by name
        if name in known:
            return known[name].outputs[0]
        makers = {"write_index_B": self._write_index, "attended_B1SM": self._attended}
        made = makers[name]()
        node = made.producer()
        if node is None:
            raise MlaDeployError("EXP-SHAPE", f"{name} is not made by a node")
        node.name = name
        return made

    def type_module_caches(self, caches: Mapping[str, CacheBuffer]) -> None:
        """Nothing yet: rules work on the fp32 of the trace."""

    def bind_step_inputs(self) -> None:
        """The graph is typed as one, caches too; what rules ask for is made at its top."""
        graph = self.model.graph
        inputs = {str(value.name): value for value in graph.inputs}
        for buffer in self.trace.trunk_buffers:
            inputs[buffer.name()].type = ir.TensorType(self.cache_dtype(buffer))
        for name in lift_step_inputs(graph):
            asked = graph.inputs.pop()
            if name != "write_index_B":
                raise MlaDeployError("EXP-SHAPE", f"a graph without layers asks for {name}")
            asked.replace_all_uses_with(self._module_write_index())

    def read_weight(self, stored: ir.Value, like: ir.Value) -> ir.Value:
        return stored

    def type_trunk(self) -> None:
        graph = self.model.graph
        weights = list(graph.initializers.values())
        assign_types(graph, self.dtype, weights, {graph.outputs[0]: _FLOAT})

    def type_layer(
        self,
        layer: ir.Model,
        traced: TracedLayer,
        held: Sequence[CacheBuffer],
        arguments: Mapping[ir.Value, ir.Value],
    ) -> None:
        common_passes.IdentityEliminationPass()(layer)
        graph, by_name = layer.graph, {str(v.name): v for v in layer.graph.inputs}
        opaque = self.calls[traced.kind.indices[0]]
        for name, given in zip(traced.inputs, opaque.inputs, strict=True):
            by_name[name].type = None if given is None else given.type
        self.visible = opaque.inputs[traced.inputs.index("visible_B1ST")]
        for name, buffer in zip(traced.held, held, strict=True):
            by_name[name].type = ir.TensorType(self.cache_dtype(buffer))
        for formal, stored in arguments.items():
            formal.type = stored.type
        if LATENT_SCALE in by_name:
            by_name[LATENT_SCALE].type = ir.TensorType(self.dtype)
        own = self.trace.buffers(traced.kind.indices[0])
        made = len(graph.outputs) - len(own)
        wanted = {
            value: self.dtype
            for value, like in zip(graph.outputs[:made], opaque.outputs, strict=True)
            if like.dtype == self.dtype
        }
        caches = zip(graph.outputs[made:], own, strict=True)
        wanted.update({value: self.cache_dtype(buffer) for value, buffer in caches})
        assign_types(graph, self.dtype, list(arguments), wanted)
        _allow_decomposition(graph)

    def rows(self, out: bool) -> int:
        return self.capacity

    def finished(self) -> ir.Model:
        _prune_arguments(self.model)
        model = super().finished()
        if self.form.scales is not None:
            # Two calls of a function would give a network two nodes with scales of one name, which
            # TensorRT refuses.
            common_passes.InlinePass()(model)
        # What rules made is named last, and an initializer of the trace may have such a name.
        common_passes.NameFixPass()(model)
        _name_apart(model)
        return model

    def _latent_scale(self, layer: int) -> ir.Value:
        """The scales of the codes of a layer, a constant of the graph."""
        if self.form.scales is None:
            raise MlaDeployError("EXP-SHAPE", "a layer of static codes, and no scales are known")
        index = next(b.index for b in self.trace.buffers(layer) if b.kind == "latent_cache")
        stored = self.form.scales.of(index).astype(self.dtype.numpy())
        return self._initializer(ir.Tensor(stored, dtype=self.dtype, name=f"latent_scale.{index}"))

    def _write_index(self) -> ir.Value:
        """min(cache_lengths, capacity - new_tokens): a write never passes the end."""
        capacity = self._added("Shape", self._input("rows_held"), start=2, end=3)
        room = self._added("Sub", capacity, self._new_tokens())
        return self._added("Min", self._input("cache_lengths"), room)

    def _module_write_index(self) -> ir.Value:
        """The same, of a capacity that is known and new tokens that the ids tell."""
        capacity = ir.node("Constant", [], attributes={"value_ints": [self.capacity]})
        tokens = ir.node("Shape", [self._input("input_ids")], attributes={"start": 1, "end": 2})
        room = ir.node("Sub", [capacity.outputs[0], tokens.outputs[0]])
        least = ir.node("Min", [self._input("cache_lengths"), room.outputs[0]])
        graph, made = self.model.graph, (capacity, tokens, room, least)
        graph.insert_before(graph[0], made)
        for node in made:
            node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        return least.outputs[0]

    def _attended(self) -> ir.Value:
        """visible, or slot 0."""
        visible = self.visible
        if visible is None:
            raise MlaDeployError("EXP-SHAPE", "a layer asks for a mask that no layer was given")
        rows_1 = self._added("Shape", visible, start=3)
        first = self._added("Less", self._range(rows_1), self._constant(1))
        return self._added("Or", visible, first)

    def _range(self, stop_1: ir.Value) -> ir.Value:
        zero, one = (self._added("Constant", value_int=number) for number in (0, 1))
        return self._added("Range", zero, self._added("Squeeze", stop_1), one)

    def _new_tokens(self) -> ir.Value:
        return self._added("Shape", self._input("input_ids"), start=1, end=2)

    def _input(self, name: str) -> ir.Value:
        return next(value for value in self.model.graph.inputs if value.name == name)

    def _constant(self, value: int) -> ir.Value:
        return self._added("Constant", value_ints=[value])

    def _added(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes or None)
        first = next(n for n in self.model.graph if n.domain == DOMAIN)
        self.model.graph.insert_before(first, node)
        return node.outputs[0]


def typed_builder(capacity: int, opset: int, ir_version: int) -> type[TypedBuilder]:
    """The builder of graphs of that capacity, for a release of that opset."""
    numbers = {"capacity": capacity, "opset": opset, "ir_version": ir_version}
    return type("TypedBuilder", (TypedBuilder,), numbers)


def _allow_decomposition(graph: ir.Graph) -> None:
    """Where no fused kernel fits (fp32, one new token over a long cache) the builder may take the
    operator apart; where one does it still takes that."""
    for node in graph:
        if node.op_type in ("Attention", "TRT_Attention"):
            node.attributes["TRT_decomposable"] = ir.AttrInt64("TRT_decomposable", 1)


def _name_apart(model: ir.Model) -> None:
    """No value of a function is called what one outside is: a parser was seen to mix them up."""
    for function in model.functions.values():
        for value in function.inputs:
            value.name = f"{function.name}.{value.name}"
        for node in function:
            for value in node.outputs:
                value.name = f"{function.name}.{value.name}"


def _prune_arguments(model: ir.Model) -> None:
    """Drop parameters of layer functions that nothing in them reads, and the arguments for them."""
    for function in model.functions.values():
        kept = [place for place, value in enumerate(function.inputs) if value.uses()]
        formal = [function.inputs[place] for place in kept]
        function.inputs.clear()
        function.inputs.extend(formal)
        for node in list(model.graph):
            if node.op_identifier() != function.identifier():
                continue
            arguments = [node.inputs[place] for place in kept]
            node.resize_inputs(0)
            node.resize_inputs(len(arguments))
            for place, value in enumerate(arguments):
                node.replace_input_with(place, value)
