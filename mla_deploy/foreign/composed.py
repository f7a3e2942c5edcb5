"""One attention of a foreign graph in our composites: the cache update, the expansion, attention.

# before:  query, key [, cached keys] -> scores -> softmax --+-- value -> out
# after:   CacheUpdate(latent_cache, [latent | rope key]) -> ExpandLatent -> Attention -> out
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mla_deploy import shapes
from mla_deploy.errors import InputError
from mla_deploy.export.trace_layer import CacheForm
from mla_deploy.export.trace_module import SOURCE
from mla_deploy.foreign.attention import Score
from mla_deploy.foreign.axes import Operand, inner_size
from mla_deploy.foreign.graph import ForeignGraph
from mla_deploy.foreign.latent import Latent
from mla_deploy.foreign.nodes import Nodes, typed
from mla_deploy.foreign.recognise import LayerFinding
from mla_deploy.foreign.step import StepNodes
from mla_deploy.source.cache_parts import CacheBuffer, CachePart, buffers_of

EXPANSION = "mla_deploy.{index}.w_kv_b"


class Attentions:
    """Puts composites in place of sites. `expansions` are the weights it made, by value."""

    def __init__(
        self, graph: ForeignGraph, nodes: Nodes, caches: dict[CacheBuffer, ir.Value]
    ) -> None:
        self.graph, self.nodes, self.caches = graph, nodes, caches
        self.expansions: dict[ir.Value, np.ndarray] = {}

    def attend(self, layer: LayerFinding, step: StepNodes) -> list[ir.Value]:
        """Put cache and attention in place of a site; the caches after the call."""
        latent, site, caches = latent_in(layer), layer.site, self.caches
        if site is None:
            return []
        batch, heads = shapes.BATCH, latent.heads
        buffers = [buffer for buffer in caches if buffer.index == layer.index]
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

    def _weight(self, name: str, array: np.ndarray) -> ir.Value:
        """A weight that is not the foreign file's."""
        value = named_input(f"{SOURCE}.{name}", array.shape, ir.DataType.FLOAT)
        self.expansions[value] = array
        return value


def latent_in(layer: LayerFinding) -> Latent:
    if layer.latent is None:
        raise InputError("REW-NO-MLA", f"attention {layer.index} is not MLA")
    return layer.latent


def layer_buffers(index: int, latent: Latent, form: CacheForm) -> tuple[CacheBuffer, ...]:
    parts = [CachePart(index, "latent", (latent.rank,))]
    parts.append(CachePart(index, "rope_key", (latent.rope,)))
    return buffers_of(parts, fused=form.fused)


def named_input(name: str, dims: tuple[int | str | None, ...], dtype: ir.DataType) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype))
