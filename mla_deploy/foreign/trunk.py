"""A recognised foreign graph turned into ours: lengths and latent caches in, logits and caches out.

    # before:  ids, [positions, mask, past keys and values] -> ... scores, softmax, values ... -> logits
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
from mla_deploy.foreign.attention import Score
from mla_deploy.foreign.axes import Operand, inner_size
from mla_deploy.foreign.graph import NEW, ROWS, ForeignGraph
from mla_deploy.foreign.latent import Latent
from mla_deploy.foreign.modern import modernise
from mla_deploy.foreign.nodes import Nodes, typed
from mla_deploy.foreign.places import Places
from mla_deploy.foreign.recognise import LayerFinding, Recognition
from mla_deploy.foreign.step import StepNodes, step_nodes
from mla_deploy.foreign.stop import shown
from mla_deploy.rewrite.rule import required
from mla_deploy.source.cache_parts import CacheBuffer, CachePart, buffers_of

EXPANSION = "mla_deploy.{index}.w_kv_b"
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
    hidden_size: int
    vocab_size: int


def raise_foreign(recognition: Recognition, form: CacheForm, all_logits: bool) -> RaisedForeign:
    """Raises: InputError REW-POSITION, REW-INPUT."""
    raising = _Raising(recognition, form, all_logits)
    return raising.raised()


class _Raising:
    def __init__(self, recognition: Recognition, form: CacheForm, all_logits: bool) -> None:
        self.found = recognition
        self.graph: ForeignGraph = recognition.graph
        self.ir: ir.Graph = self.graph.model.graph
        self.form, self.all_logits = form, all_logits
        self.nodes = Nodes(self.ir)
        self.buffers = {
            layer.index: _buffers(layer.index, _latent(layer), form) for layer in recognition.layers
        }
        self.weights: dict[str, ir.TensorProtocol | torch.Tensor] = {}
        self.tables: set[ir.Value] = set()
        self.expansions: list[ir.Value] = []

    def raised(self) -> RaisedForeign:
        graph, old_logits = self.graph, self.graph.logits
        hidden, vocab = self._embedding_width(), graph.axes(old_logits) or (0,)
        _rename(self.ir)
        modernise(self.ir, self.nodes)
        caches = {
            buffer: _input(buffer.name(), (shapes.BATCH, 1, None, *buffer.shape), ir.DataType.FLOAT)
            for buffers in self.buffers.values()
            for buffer in buffers
        }
        batch = shapes.BATCH
        dims = ((batch, shapes.NEW_TOKENS), (batch,), (batch,))
        ids, before, new = (
            _input(name, each, ir.DataType.INT64) for name, each in zip(INPUTS, dims, strict=True)
        )
        inputs = (ids, before, new)
        first = next(iter(caches.values()))
        step = step_nodes(self.nodes, inputs, first, self.form.growing)
        places = Places(graph, self.nodes, step)
        trunk = _trunk(graph, self.found.layers, places)
        self._place_tables(trunk, places)
        self._rewrite_sizes(trunk, step)
        updated: list[ir.Value] = []
        for layer in self.found.layers:
            updated.extend(self._attend(layer, step, caches))
        logits = self._logits(step)
        self._replace_inputs(step)
        self.ir.outputs[:] = [logits, *updated]
        self.ir.inputs[:] = [*inputs, *caches.values(), *self.expansions]
        self._lift_weights()
        model = graph.model
        common_passes.RemoveUnusedNodesPass()(model)
        common_passes.TopologicalSortPass()(model)
        self._require_closed()
        return RaisedForeign(
            trace=self._trace(tuple(caches)),
            weights=self.weights,
            latents=tuple(_latent(layer) for layer in self.found.layers),
            hidden_size=hidden,
            vocab_size=int(vocab[-1]),
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

    def _embedding_width(self) -> int:
        for node, _ in self.graph.ids.uses():
            axes = self.graph.axes(node.outputs[0])
            if node.op_type == "Gather" and axes is not None and isinstance(axes[-1], int):
                return axes[-1]
        return 1

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

    def _attend(
        self, layer: LayerFinding, step: StepNodes, caches: dict[CacheBuffer, ir.Value]
    ) -> list[ir.Value]:
        """Put cache and attention in place of a site; the caches after the call."""
        latent, site = _latent(layer), layer.site
        if site is None:
            return []
        batch, heads = shapes.BATCH, latent.heads
        buffers = self.buffers[layer.index]
        rows_B1SW = self._rows(latent)
        width = latent.rank + latent.rope
        wanted = [rows_B1SW]
        if len(buffers) > 1:
            wanted = [
                self.nodes.sliced(rows_B1SW, first, last, -1)
                for first, last in ((0, latent.rank), (latent.rank, width))
            ]
        updated, held = [], []
        for buffer, rows in zip(buffers, wanted, strict=True):
            typed(rows, (batch, 1, shapes.NEW_TOKENS, *buffer.shape))
            dims = (batch, 1, None, *buffer.shape)
            out, every = self.nodes.composite(
                "CacheUpdate", (caches[buffer], rows, *step.update), (dims, dims), cleared=1
            )
            updated.append(out)
            held.append(every)
        if len(held) == 1:
            parts = ((0, latent.rank), (latent.rank, width))
            held = [self.nodes.sliced(held[0], *ends, 3) for ends in parts]
        for value, size in zip(held, (latent.rank, latent.rope), strict=True):
            typed(value, (batch, 1, None, size))
        w_kv_b = self._weight(EXPANSION.format(index=layer.index), latent.w_kv_b)
        key, value = self.nodes.composite(
            "ExpandLatent",
            (*held, w_kv_b),
            (
                (batch, heads, None, latent.nope + latent.rope),
                (batch, heads, None, latent.value),
            ),
            heads=heads,
            nope=latent.nope,
            value=latent.value,
        )
        query = self._query(site.scores, latent, step)
        (out_BHSV,) = self.nodes.composite(
            "Attention",
            (query, key, value, step.visible_B1ST),
            ((batch, heads, shapes.NEW_TOKENS, latent.value),),
            scale=site.scores[0].factor * latent.rope_factor,
        )
        if latent.value_bias_HV is not None:
            bias = self.nodes.constant(latent.value_bias_HV[:, None].astype(np.float32))
            out_BHSV = self.nodes.Add(out_BHSV, bias)
        site.out.value.replace_all_uses_with(self._as_found(out_BHSV, site.out, latent, step))
        return updated

    def _rows(self, latent: Latent) -> ir.Value:
        """What is cached of the new tokens, [B, 1, S, L + R]."""
        parts, width = [], 0
        for value in latent.rows:
            parts.append(self._by_token(value))
            width += inner_size(self.graph, value)
        joined = parts[0] if len(parts) == 1 else self.nodes.Concat(*parts, axis=-1)
        return self.nodes.picked(joined, (*latent.latent, *latent.rope_key), width)

    def _by_token(self, value: ir.Value) -> ir.Value:
        """[B, 1, S, W] of a value with an axis of rows, one of new tokens, and others."""
        axes = self.graph.axes(value) or ()
        width = inner_size(self.graph, value)
        if axes == ("B", 1, "S", width):
            return value
        rest = [place for place, axis in enumerate(axes) if isinstance(axis, int)]
        if "B" not in axes:
            value, rest = self.nodes.Unsqueeze(value, self.nodes.ints(0)), [r + 1 for r in rest]
            axes = ("B", *axes)
        order = [axes.index("B"), axes.index("S"), *rest]
        if order != list(range(len(axes))):
            value = self.nodes.Transpose(value, perm=order)
        flat = self.nodes.Reshape(value, self.nodes.ints(0, 0, width))
        found: ir.Value = self.nodes.Unsqueeze(flat, self.nodes.ints(1))
        return found

    def _query(self, scores: tuple[Score, ...], latent: Latent, step: StepNodes) -> ir.Value:
        """Every product's query side by side, [B, H, S, N + R], columns as the latent form asks."""
        parts, width = [], 0
        for score in scores:
            part = self._by_head(score.query, step)
            factor = score.factor / scores[0].factor
            if factor != 1:
                part = self.nodes.Mul(part, self.nodes.constant(np.array(factor, np.float32)))
            size = score.query.width(self.graph)
            parts.append(typed(part, (shapes.BATCH, latent.heads, shapes.NEW_TOKENS, size)))
            width += size
        if len(parts) == 1 and latent.columns == tuple(range(width)):
            joined = parts[0]
        elif latent.columns == tuple(range(width)):
            joined = self.nodes.Concat(*parts, axis=-1)
        else:
            whole = parts[0] if len(parts) == 1 else self.nodes.Concat(*parts, axis=-1)
            joined = self._in_order(whole, latent, width)
        if any(factor != 1 for factor in latent.factors):
            factors = self.nodes.constant(np.array(latent.factors, np.float32))
            joined = self.nodes.Mul(joined, factors)
        dims = (shapes.BATCH, latent.heads, shapes.NEW_TOKENS, len(latent.columns))
        return typed(joined, dims)

    def _in_order(self, whole: ir.Value, latent: Latent, width: int) -> ir.Value:
        """The columns in N + R order, each half by itself, so that absorbing finds them apart."""
        batch, new = shapes.BATCH, shapes.NEW_TOKENS
        halves = [
            self.nodes.picked(whole, places, width)
            for places in (latent.columns[: latent.nope], latent.columns[latent.nope :])
            if places
        ]
        if len(halves) == 1:
            return halves[0]
        for half, size in zip(halves, (latent.nope, latent.rope), strict=True):
            typed(half, (batch, latent.heads, new, size))
        found: ir.Value = self.nodes.Concat(*halves, axis=-1)
        return found

    def _by_head(self, operand: Operand, step: StepNodes) -> ir.Value:
        """A query as [B, H, S, E]."""
        nodes, value, axes = self.nodes, operand.value, operand.axes
        if operand.heads:
            split = nodes.ints(0, 0, operand.heads, operand.width(self.graph))
            value, axes = nodes.Reshape(value, split), f"{axes[:-1]}H{axes[-1]}"
        if "X" in axes:
            value = self._rows_apart(value, axes, operand, step)
            axes = axes.replace("X", "BH")
        for letter in "BH":
            if letter not in axes:
                value, axes = nodes.Unsqueeze(value, nodes.ints(0)), letter + axes
        order = [axes.index(letter) for letter in "BHSE"]
        found: ir.Value = value if order == [0, 1, 2, 3] else nodes.Transpose(value, perm=order)
        return found

    def _rows_apart(
        self, value: ir.Value, axes: str, operand: Operand, step: StepNodes
    ) -> ir.Value:
        dims = []
        for letter, size in zip(axes, self.graph.known.shapes[operand.value], strict=True):
            if letter == "X":
                dims += [step.batch_1, self.nodes.ints(operand.count(self.graph))]
            else:
                dims.append(step.new_1 if letter == "S" else self.nodes.ints(size))
        found: ir.Value = self.nodes.Reshape(value, self.nodes.Concat(*dims, axis=0))
        return found

    def _as_found(
        self, out_BHSV: ir.Value, found: Operand, latent: Latent, step: StepNodes
    ) -> ir.Value:
        """[B, H, S, V] in the axes that the foreign graph reads it in."""
        nodes, axes = self.nodes, found.axes
        wanted = axes.replace("X", "BH")
        if found.heads:
            wanted = f"{axes[:-1]}H{axes[-1]}"
        squeezed = [letter for letter in "BH" if letter not in wanted]
        order = ["BHSV".index(letter) for letter in (*squeezed, *wanted)]
        value = out_BHSV if order == [0, 1, 2, 3] else nodes.Transpose(out_BHSV, perm=order)
        if squeezed:
            value = nodes.Squeeze(value, nodes.ints(*range(len(squeezed))))
        if found.heads:
            value = nodes.Reshape(value, nodes.ints(0, 0, latent.heads * latent.value))
        if "X" in axes:
            dims = {"X": nodes.ints(-1), "S": step.new_1, "V": nodes.ints(latent.value)}
            value = nodes.Reshape(value, nodes.Concat(*(dims[a] for a in axes), axis=0))
        return value

    def _logits(self, step: StepNodes) -> ir.Value:
        """Logits of the tokens that are wanted; zeros where there is none."""
        nodes, logits = self.nodes, self.graph.logits
        zero = nodes.constant(np.array(0.0, np.float32))
        if self.all_logits:
            found: ir.Value = nodes.Where(step.valid_BS1, logits, zero)
            return typed(found, (shapes.BATCH, shapes.NEW_TOKENS, logits.shape[-1] if logits.shape else None))
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

    def _weight(self, name: str, array: np.ndarray) -> ir.Value:
        """A weight that is not the foreign file's."""
        self.weights[name] = torch.from_numpy(array)
        self.expansions.append(_input(f"{SOURCE}.{name}", array.shape, ir.DataType.FLOAT))
        return self.expansions[-1]

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


def _latent(layer: LayerFinding) -> Latent:
    if layer.latent is None:
        raise InputError("REW-NO-MLA", f"attention {layer.index} is not MLA")
    return layer.latent


def _buffers(index: int, latent: Latent, form: CacheForm) -> tuple[CacheBuffer, ...]:
    parts = [CachePart(index, "latent", (latent.rank,))]
    parts.append(CachePart(index, "rope_key", (latent.rope,)))
    return buffers_of(parts, fused=form.fused)


def _input(name: str, dims: tuple[int | str | None, ...], dtype: ir.DataType) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype))


def _trunk(
    graph: ForeignGraph, layers: tuple[LayerFinding, ...], places: Places
) -> list[ir.Node]:
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
            waiting.extend(_latent(layer).rows)
            continue
        node = value.producer()
        if node is None:
            continue
        found.add(node)
        if node.op_type == "Shape" and node.domain == "":
            continue  # sizes are read off the token ids
        for parent in node.inputs:
            is_table = (
                parent in graph.positional
                and graph.depends(value)
                and not places.is_by_row(parent)
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
