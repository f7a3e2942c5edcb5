"""A recognised foreign graph as ours: lengths and latent caches in, logits and caches out.

    # before:  ids, [positions, mask, past keys and values] -> ... softmax ... -> logits
    # after:   ids, cache_lengths, new_lengths, latent_cache.{i}
    #              -> ... CacheUpdate, ExpandLatent, Attention ... -> logits, latent_cache_out.{i}

The graph is changed in place. What lay between an attention and its latent is left behind; masks
and positions follow from the lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common as common_passes

from mla_deploy import shapes
from mla_deploy.errors import InputError, quoted
from mla_deploy.export.trace import Trace
from mla_deploy.export.trace_layer import CacheForm
from mla_deploy.export.trace_module import INPUTS, SOURCE
from mla_deploy.foreign.composed import Attentions, latent_in, layer_buffers, named_input
from mla_deploy.foreign.graph import NEW, ROWS, ForeignGraph
from mla_deploy.foreign.latent import Latent
from mla_deploy.foreign.modern import free_rows, modernise
from mla_deploy.foreign.nodes import Nodes, typed
from mla_deploy.foreign.places import Places
from mla_deploy.foreign.recognise import LayerFinding, Recognition
from mla_deploy.foreign.step import StepNodes, step_nodes
from mla_deploy.foreign.stop import shown
from mla_deploy.rewrite.rule import required
from mla_deploy.source.cache_parts import CacheBuffer

# Numbers in a constant that stays in the graph: more is a weight, and lies in the weight file.
_INLINE = 16
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_FLOATS = (ir.DataType.FLOAT, *_HALVES)


@dataclass(frozen=True)
class RaisedForeign:
    """The raised graph as a trace that is all trunk, and where its weights come from."""

    trace: Trace
    weights: dict[str, ir.TensorProtocol | torch.Tensor]
    latents: tuple[Latent, ...]
    dtype: str  # what most foreign weights are stored in


def raise_foreign(
    recognition: Recognition, form: CacheForm, all_logits: bool, dtype: str
) -> RaisedForeign:
    """`dtype`: of the foreign weights. Raises: InputError REW-POSITION, REW-INPUT."""
    raising = _Raising(recognition, form, all_logits)
    return raising.raised(dtype)


class _Raising:
    def __init__(self, recognition: Recognition, form: CacheForm, all_logits: bool) -> None:
        self.found = recognition
        self.graph: ForeignGraph = recognition.graph
        self.ir: ir.Graph = self.graph.model.graph
        self.form, self.all_logits = form, all_logits
        self.nodes = Nodes(self.ir)
        self.weights: dict[str, ir.TensorProtocol | torch.Tensor] = {}
        self.tables: set[ir.Value] = set()

    def raised(self, dtype: str) -> RaisedForeign:
        graph = self.graph
        _rename(self.ir)
        if not graph.has_rows:
            free_rows(graph, self.nodes)
        modernise(self.ir, self.nodes)
        batch = shapes.BATCH
        caches = {
            buffer: named_input(buffer.name(), (batch, 1, None, *buffer.shape), ir.DataType.FLOAT)
            for layer in self.found.layers
            for buffer in layer_buffers(layer.index, latent_in(layer), self.form)
        }
        dims = ((batch, shapes.NEW_TOKENS), (batch,), (batch,))
        inputs = tuple(
            named_input(name, each, ir.DataType.INT64)
            for name, each in zip(INPUTS, dims, strict=True)
        )
        first = next(iter(caches.values()))
        step = step_nodes(self.nodes, inputs, first, self.form.growing)
        places = Places(graph, self.nodes, step)
        trunk = _trunk(graph, self.found.layers, places)
        self._place_tables(trunk, places)
        self._rewrite_sizes(trunk, step)
        attentions = Attentions(graph, self.nodes, caches)
        updated = [cache for layer in self.found.layers for cache in attentions.attend(layer, step)]
        logits = self._logits(step)
        self._replace_inputs(step)
        self.ir.outputs[:] = [logits, *updated]
        self.ir.inputs[:] = [*inputs, *caches.values(), *attentions.expansions]
        for value, array in attentions.expansions.items():
            self.weights[str(value.name).removeprefix(f"{SOURCE}.")] = torch.from_numpy(array)
        self._lift_weights()
        model = graph.model
        common_passes.RemoveUnusedNodesPass()(model)
        common_passes.TopologicalSortPass()(model)
        self._require_closed()
        return RaisedForeign(
            trace=self._trace(tuple(caches)),
            weights=self.weights,
            latents=tuple(latent_in(layer) for layer in self.found.layers),
            dtype=dtype,
        )

    def _trace(self, buffers: tuple[CacheBuffer, ...]) -> Trace:
        return Trace(
            trunk=self.graph.model,
            trunk_weights=tuple(self.weights),
            layers=(),
            calls=(),
            rope={},
            tied={},
            constants={},
            layers_prefix="",
            form=self.form,
            trunk_buffers=buffers,
        )

    def _place_tables(self, trunk: list[ir.Node], places: Places) -> None:
        for node in trunk:
            for place, value in enumerate(node.inputs):
                if value is None or value not in self.graph.positional:
                    continue
                if self.graph.depends(node.outputs[0]) and not places.is_by_row(value):
                    node.replace_input_with(place, places.placed(value, node, place))
                    self.tables.add(value)

    def _rewrite_sizes(self, trunk: list[ir.Node], step: StepNodes) -> None:
        """Rows and new tokens are read off the token ids, whatever they were read off."""
        for node in trunk:
            if node.op_type != "Shape" or node.domain != "":
                continue
            source = required(node.inputs[0])
            shape = self.graph.known.shapes.get(source)
            start = node.attributes.get_int("start", 0)
            sizes = shape[start : node.attributes.get_int("end", len(shape))] if shape else ()
            parts = [self._size(size, step) for size in sizes]
            if parts and start == 0 and (self.graph.axes(source) or ("",))[0] == "B":
                parts[0] = step.batch_1
            known = [part for part in parts if part is not None]
            if known and len(known) == len(parts):
                joined = known[0] if len(known) == 1 else self.nodes.Concat(*known, axis=0)
                node.outputs[0].replace_all_uses_with(joined)

    def _size(self, size: int, step: StepNodes) -> ir.Value | None:
        """A size as a vector of one integer; None where it is not of rows and new tokens."""
        if size == ROWS:
            return step.batch_1
        if size == NEW:
            return step.new_1
        for base, one in ((ROWS, step.batch_1), (NEW, step.new_1)):
            if size > base and size % base == 0:
                rest = self._size(size // base, step)
                return None if rest is None else self.nodes.Mul(one, rest)
        return self.nodes.ints(size) if size < ROWS else None

    def _logits(self, step: StepNodes) -> ir.Value:
        """Logits of the tokens that are wanted; zeros where there is none."""
        nodes, logits = self.nodes, self.graph.logits
        zero = nodes.constant(np.array(0.0, np.float32))
        if self.all_logits:
            found: ir.Value = nodes.Where(step.valid_BS1, logits, zero)
            return typed(found, (shapes.BATCH, shapes.NEW_TOKENS, None))
        hidden, readers = _head(self.graph)
        axes = self.graph.axes(hidden) or (0,)
        dims = (shapes.BATCH, None, int(axes[-1]))
        typed(hidden, dims)
        users = list(hidden.uses())
        (kept,) = nodes.composite("HeadTokens", (hidden, step.new_lengths_B), (dims,))
        for node, place in users:
            if node in readers:
                node.replace_input_with(place, kept)
        made: ir.Value = kept if hidden is logits else logits
        return typed(nodes.Where(step.active_B11, made, zero), (shapes.BATCH, None, None))

    def _replace_inputs(self, step: StepNodes) -> None:
        nodes, graph = self.nodes, self.graph
        as_found = ir.DataType.INT64 if graph.ids.dtype is None else graph.ids.dtype
        ids = step.ids if as_found == ir.DataType.INT64 else nodes.Cast(step.ids, to=as_found)
        graph.ids.replace_all_uses_with(ids)
        for positions in graph.positions:
            if "B" in (graph.axes(positions) or ()):
                kind = positions.dtype or ir.DataType.INT64
                positions.replace_all_uses_with(nodes.Cast(step.positions_BS, to=kind))

    def _lift_weights(self) -> None:
        """Initializers become inputs named as weights; small ones stay."""
        tables = {value for value in self.tables if value.const_value is not None}
        for name, value in list(self.ir.initializers.items()):
            tensor = value.const_value
            if tensor is None or not value.uses():
                self.ir.initializers.pop(name)
                continue
            if "." not in name:
                value.name = f"source.{name}"
            if tensor.dtype not in _FLOATS:
                continue
            if int(np.prod(tensor.shape.numpy())) <= _INLINE or value in tables:
                if tensor.dtype in _HALVES:
                    value.const_value = ir.tensor(tensor.numpy().astype(np.float32), name=name)
                    value.type = ir.TensorType(ir.DataType.FLOAT)
                continue
            self.ir.initializers.pop(str(value.name))
            value.const_value = None
            # Rules name what they make `val_1` and so on, as exporters do.
            stored = name if "." in name else f"source.{name}"
            typed(value, tuple(tensor.shape.numpy())).name = f"{SOURCE}.{stored}"
            self.weights[stored] = tensor
            self.ir.inputs.append(value)

    def _require_closed(self) -> None:
        """Nothing may be left that reads an input of the foreign graph."""
        given = set(self.ir.inputs) | set(self.ir.initializers.values())
        for node in self.ir:
            for value in node.inputs:
                if value is not None and value.producer() is None and value not in given:
                    raise InputError(
                        "REW-INPUT",
                        f"{shown(node)} reads {quoted(value.name)} outside of attention",
                        hint="masks, positions and caches are replaced by the lengths of each row; "
                        "what else is made of them cannot be",
                        node=shown(node),
                    )


def _rename(graph: ir.Graph) -> None:
    """The names of our contract are taken: `logits`, say."""
    for node in ir.traversal.RecursiveGraphIterator(graph):
        for value in node.outputs:
            if value.name:
                value.name = f"source.{value.name}"
        node.name = f"source.{node.name}" if node.name else None


def _trunk(graph: ForeignGraph, layers: tuple[LayerFinding, ...], places: Places) -> list[ir.Node]:
    """What the logits need, attentions standing for all that lies between them and the cut."""
    sites = {layer.site.out.value: layer for layer in layers if layer.site is not None}
    waiting: list[ir.Value] = [graph.logits]
    seen: set[ir.Value] = set()
    found: set[ir.Node] = set()
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        layer = sites.get(value)
        if layer is not None and layer.site is not None:
            waiting.extend(score.query.value for score in layer.site.scores)
            waiting.extend(latent_in(layer).rows)
            continue
        node = value.producer()
        if node is None:
            continue
        found.add(node)
        if node.op_type == "Shape" and node.domain == "":
            continue  # sizes are read off the token ids
        for parent in node.inputs:
            is_table = (
                parent in graph.positional and graph.depends(value) and not places.is_by_row(parent)
            )
            if parent is not None and not is_table:
                waiting.append(parent)
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                for inner in ir.traversal.RecursiveGraphIterator(attribute.as_graph()):
                    waiting.extend(v for v in inner.inputs if v is not None)
    return [node for node in graph.model.graph if node in found]


def _head(graph: ForeignGraph) -> tuple[ir.Value, set[ir.Node]]:
    """What the widest product, if it is the last one, multiplies; and that product.

    Between the product and the logits only one number may be multiplied with.
    """
    value = graph.logits
    while True:
        node = value.producer()
        if node is None or len(value.uses()) > 1:
            return graph.logits, set()
        inputs = [each for each in node.inputs if each is not None]
        variable = [each for each in inputs if each in graph.from_ids]
        others = [each for each in inputs if each not in variable]
        if node.op_type in ("Cast", "Identity") or (
            node.op_type in ("Mul", "Div", "Add", "Sub", "Tanh")
            and len(variable) == 1
            and all(len(graph.known.shapes.get(each, (1, 1))) < 2 for each in others)
        ):
            value = variable[0]
            continue
        first = node.inputs[0]
        is_head = node.op_type == "MatMul" and len(variable) == 1 and variable[0] is first
        if is_head and first is not None and (graph.axes(first) or ())[:2] == ("B", "S"):
            return first, {node}
        return graph.logits, set()
