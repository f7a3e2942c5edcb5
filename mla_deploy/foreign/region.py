"""A part of a foreign graph computed by itself, in fp32: from given values to wanted ones.

ONNX Runtime computes it, on weights that are read for it, so that an expansion may be written with
any operator. What comes from sizes alone is filled in as numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from mla_deploy.foreign.graph import ForeignGraph, Sizes
from mla_deploy.foreign.sizes import Shape, computed_value, tensor_type
from mla_deploy.foreign.stop import Stop

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_ERRORS_ONLY = 3
_LEAST_IR = 10


class Sized:
    """What is known with given sizes, computed when asked for."""

    def __init__(self, graph: ForeignGraph, sizes: Sizes) -> None:
        self._graph, self._sizes = graph, sizes
        self._values: dict[ir.Value, np.ndarray | None] = {}

    def shape(self, value: ir.Value) -> Shape:
        """Raises: KeyError where it cannot be told."""
        shape = self._graph.shape(value, self._sizes)
        if shape is None:
            raise KeyError(value)
        return shape

    def value(self, value: ir.Value) -> np.ndarray | None:
        """A small value, None where sizes and constants do not tell it."""
        if value not in self._values:
            self._values[value] = self._computed(value)
        return self._values[value]

    def _computed(self, value: ir.Value) -> np.ndarray | None:
        node = value.producer()
        if value not in self._graph.known.values or node is None or value.const_value is not None:
            return self._graph.known.values.get(value)
        if node.op_type in ("Shape", "Size") and node.inputs[0] is not None:
            shape = self.shape(node.inputs[0])
            if node.op_type == "Size":
                return np.array(np.prod(shape), dtype=np.int64)
            start = node.attributes.get_int("start", 0)
            end = node.attributes.get_int("end", len(shape))
            return np.array(shape[start:end], dtype=np.int64)
        inputs = [None if each is None else self.value(each) for each in node.inputs]
        made = computed_value(node, inputs)
        return None if made is None else made[node.outputs.index(value)]


class Region:
    """Computes parts of one graph."""

    def __init__(self, graph: ForeignGraph) -> None:
        self.graph = graph
        self._known: dict[Sizes, Sized] = {}
        self.masks: dict[tuple[object, Sizes], np.ndarray] = {}  # layers share theirs

    def known(self, sizes: Sizes) -> Sized:
        """What sizes alone decide."""
        if sizes not in self._known:
            self._known[sizes] = Sized(self.graph, sizes)
        return self._known[sizes]

    def values(
        self,
        wanted: Sequence[ir.Value],
        given: Mapping[ir.Value, np.ndarray],
        sizes: Sizes,
        step: str,
    ) -> list[np.ndarray]:
        """`wanted`, where `given` stand for what is not computed. Raises: Stop (of `step`)."""
        part = _Part(self.graph, self.known(sizes), given, step)
        for value in wanted:
            part.need(value)
        model = part.model(wanted)
        feeds = {part.name(value): part.feed(value) for value in given if value in part.inputs}
        options = ort.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            session = ort.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            found: list[np.ndarray] = session.run([part.name(v) for v in wanted], feeds)
        except Exception as problem:  # onnxruntime's own classes, all straight from Exception
            if isinstance(problem, MemoryError):
                raise
            told = str(problem).strip().partition("\n")[0]
            raise Stop(step, wanted[-1], f"ONNX Runtime does not compute it: {told}") from problem
        return found


class _Part:
    """The nodes between given and wanted values, with constants for what is known."""

    def __init__(
        self,
        graph: ForeignGraph,
        known: Sized,
        given: Mapping[ir.Value, np.ndarray],
        step: str,
    ) -> None:
        self.graph, self.known, self.given, self.step = graph, known, given, step
        self.inputs: dict[ir.Value, None] = {}
        self.constants: dict[ir.Value, np.ndarray] = {}
        self._nodes: set[ir.Node] = set()

    def need(self, value: ir.Value) -> None:
        """Find what `value` is computed from."""
        waiting, seen = [value], set()
        while waiting:
            each = waiting.pop()
            if each in seen:
                continue
            seen.add(each)
            node = each.producer()
            if each in self.given:
                self.inputs[each] = None
            elif (found := self._small(each)) is not None:
                self.constants[each] = _wide(found)
            elif each in self.graph.caches:
                self.constants[each] = np.zeros(self.known.shape(each), dtype=np.float32)
            elif each.const_value is not None:
                self.constants[each] = _wide(each.const_value.numpy())
            elif node is None:
                raise Stop(self.step, each, "it cannot be computed apart from the model's inputs")
            else:
                self._nodes.add(node)
                waiting.extend(v for v in node.inputs if v is not None)
                like = node.inputs[1] if node.op_type == "CastLike" else None
                if like is not None and self.graph.depends(like) and like not in self.given:
                    waiting.remove(like)
                    dtype = ir.DataType(self.graph.known.dtypes.get(like, 1))
                    self.constants[like] = _wide(np.zeros((), dtype.numpy()))

    def _small(self, value: ir.Value) -> np.ndarray | None:
        return None if self.graph.depends(value) else self.known.value(value)

    def name(self, value: ir.Value) -> str:
        return str(value.name)

    def feed(self, value: ir.Value) -> np.ndarray:
        return _wide(self.given[value])

    def model(self, wanted: Sequence[ir.Value]) -> onnx.ModelProto:
        """The part as a model of its own."""
        nodes = [_widened(ir.to_proto(n)) for n in self.graph.model.graph if n in self._nodes]
        inputs = []
        for value in self.inputs:
            feed = self.feed(value)
            kind = tensor_type(int(ir.DataType.from_numpy(feed.dtype)), feed.shape)
            inputs.append(onnx.ValueInfoProto(name=self.name(value), type=kind))
        for value in wanted:
            if value.producer() not in self._nodes:  # a graph gives what it makes
                raise Stop(self.step, value, "it is not made from the latent")
        graph = onnx.GraphProto(
            name="part",
            node=nodes,
            input=inputs,
            output=[onnx.ValueInfoProto(name=self.name(value)) for value in wanted],
            initializer=[
                onnx.numpy_helper.from_array(array, self.name(value))
                for value, array in self.constants.items()
            ],
        )
        opsets = self.graph.model.graph.opset_imports.items()
        return onnx.ModelProto(
            ir_version=max(_LEAST_IR, self.graph.model.ir_version or 0),
            opset_import=[onnx.OperatorSetIdProto(domain=d, version=v) for d, v in opsets],
            graph=graph,
        )


def _wide(array: np.ndarray) -> np.ndarray:
    """Halves as fp32: ONNX Runtime's CPU kernels do not take all of them."""
    kind = ir.DataType.from_numpy(array.dtype)
    return array.astype(np.float32) if kind in HALVES else array


def _widened(node: onnx.NodeProto) -> onnx.NodeProto:
    """The node with fp32 wherever it names a half."""
    halves = {int(kind) for kind in HALVES}
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype") and attribute.i in halves:
            attribute.i = int(ir.DataType.FLOAT)
        if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type in halves:
            array = _wide(onnx.numpy_helper.to_array(attribute.t))
            attribute.t.CopyFrom(onnx.numpy_helper.from_array(array))
    return node
