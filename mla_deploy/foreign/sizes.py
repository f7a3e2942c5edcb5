"""What is known of every value when rows and tokens have given numbers: its shape, small values.

Exporters compute shapes in the graph (Shape, Gather, Concat, Reshape ...), often without recording
what comes out. Each node is inferred with the numbers of what it reads, so a shape that is computed
is a number too. Weights stay where they are: only what is small has a value here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np
import onnx
import onnx_ir as ir
from onnx import defs, shape_inference
from onnx.reference import ReferenceEvaluator

Shape = tuple[int, ...]
# Elements of a value that is worth computing: shapes, scales, inverse frequencies.
SMALL = 4096
UNBOUNDED = 1 << 31  # an end of a slice from here on means all
# Operators whose first result is as their first input, in domains without schemas here.
_LIKE_FIRST = {
    "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "FastGelu", "QuickGelu",
    "BiasGelu", "RotaryEmbedding", "SkipLayerNormalization", "LayerNormalization", "Gelu",
}  # fmt: skip
_RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli"}


@dataclass
class Known:
    """Shapes and small values, by graph value; absent where they cannot be told."""

    shapes: dict[ir.Value, Shape] = field(default_factory=dict)
    values: dict[ir.Value, np.ndarray] = field(default_factory=dict)
    dtypes: dict[ir.Value, int] = field(default_factory=dict)

    def scalar(self, value: ir.Value | None) -> float | None:
        """The number that a value of one element is, None where it is not known."""
        found = self.values.get(value) if value is not None else None
        return float(found.item()) if found is not None and found.size == 1 else None


def known_values(
    model: ir.Model,
    shapes: Mapping[ir.Value, Shape],
    given: Mapping[ir.Value, np.ndarray] | None = None,
) -> Known:
    """What is known when the graph's inputs have `shapes` and some of them the values `given`."""
    known = Known()
    for value, shape in shapes.items():
        known.shapes[value] = shape
        known.dtypes[value] = int(value.dtype or ir.DataType.FLOAT)
    for value, array in (given or {}).items():
        known.values[value] = array
    for value in model.graph.initializers.values():
        _hold(known, value)
    inference = _Inference(model)
    for node in model.graph:
        inference.of(known, node)
    return known


def computed_value(node: ir.Node, inputs: list[np.ndarray | None]) -> list[np.ndarray] | None:
    """What a node makes of small values; None where the reference does not know the operator."""
    if node.op_type in _RANDOM:
        return None
    proto = _bare(node)
    feeds = {name: a for name, a in zip(proto.input, inputs, strict=True) if a is not None}
    try:
        results = ReferenceEvaluator(proto).run(None, feeds)
    except Exception:  # an operator that the reference does not know: unknown is a fine answer
        return None
    found = [
        np.asarray(result) for result in results if isinstance(result, np.ndarray | np.generic)
    ]
    return found if len(found) == len(results) else None


def _bare(node: ir.Node) -> onnx.NodeProto:
    """The node with names that say only which operand is which, so that alike nodes are equal."""
    proto = ir.to_proto(node)
    proto.name, proto.doc_string = "", ""
    del proto.metadata_props[:]
    proto.input[:] = [f"i{place}" if name else "" for place, name in enumerate(proto.input)]
    proto.output[:] = [f"o{place}" for place in range(len(proto.output))]
    return proto


def _hold(known: Known, value: ir.Value) -> None:
    tensor = value.const_value
    if tensor is None:
        return
    shape = tuple(tensor.shape.numpy())
    known.shapes[value], known.dtypes[value] = shape, int(tensor.dtype)
    if prod(shape) <= SMALL:
        known.values[value] = tensor.numpy()


class _Inference:
    """Infers one node after the other; alike nodes (a layer, then the next) once."""

    def __init__(self, model: ir.Model) -> None:
        self._versions = dict(model.graph.opset_imports)
        self._schemas: dict[tuple[str, str], defs.OpSchema | None] = {}
        self._found: dict[tuple[object, ...], tuple[_Results, list[np.ndarray] | None]] = {}
        self.imports = [
            onnx.OperatorSetIdProto(domain=domain, version=version)
            for domain, version in self._versions.items()
        ]

    def of(self, known: Known, node: ir.Node) -> None:
        """Learn what `node` makes."""
        if node.op_type == "Constant" and node.domain == "":
            tensor = _constant(node)
            if tensor is not None:
                node.outputs[0].const_value = tensor
                _hold(known, node.outputs[0])
            return
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
               for a in node.attributes.values()):  # fmt: skip
            return
        if _sizes(known, node) or _cut_table(known, node):
            return
        inputs = [value for value in node.inputs if value is not None]
        if not all(value in known.shapes for value in inputs):
            return
        proto = _bare(node)
        key = (proto.SerializeToString(), *(_described(known, value) for value in node.inputs))
        if key not in self._found:
            self._found[key] = self._inferred(known, node, proto)
        shapes, arrays = self._found[key]
        for value, found in zip(node.outputs, shapes, strict=False):
            if found is not None:
                known.shapes[value], known.dtypes[value] = found
        for value, array in zip(node.outputs, arrays or (), strict=False):
            _put(known, value, array)

    def _inferred(
        self, known: Known, node: ir.Node, proto: onnx.NodeProto
    ) -> tuple[_Results, list[np.ndarray] | None]:
        schema = self._schema(node)
        if schema is None:
            return _without_schema(known, node), None
        types, data, inputs = {}, {}, list[np.ndarray | None]()
        for name, value in zip(proto.input, node.inputs, strict=True):
            inputs.append(None if value is None else known.values.get(value))
            if value is None:
                continue
            types[name] = tensor_type(known.dtypes[value], known.shapes[value])
            array = inputs[-1]
            if array is not None and array.dtype.kind in "iuf":
                data[name] = onnx.numpy_helper.from_array(array, name)
        try:
            made = shape_inference.infer_node_outputs(
                schema, proto, types, data, opset_imports=self.imports
            )
        except Exception:  # onnx raises classes of its C++ part; unknown is a fine answer
            return [], None
        results = [_result(made.get(name)) for name in proto.output]
        small = results and results[0] is not None and prod(results[0][0]) <= SMALL
        whole = len(data) == len(types) or all(
            value is None or value in known.values for value in node.inputs
        )
        computed = computed_value(node, inputs) if small and whole and inputs else None
        return results, computed

    def _schema(self, node: ir.Node) -> defs.OpSchema | None:
        key = (node.domain, node.op_type)
        if key not in self._schemas:
            version = self._versions.get(node.domain, 1)
            try:
                found = defs.get_schema(node.op_type, version, node.domain)
                if not found.has_type_and_shape_inference_function:
                    found = defs.get_schema(node.op_type, domain=node.domain)
                self._schemas[key] = found  # LessOrEqual tells its shape since opset 16 only
            except defs.SchemaError:
                self._schemas[key] = None
        return self._schemas[key]


def tensor_type(dtype: int, shape: Shape) -> onnx.TypeProto:
    """The type of a tensor, as onnx writes it."""
    found = onnx.TypeProto()
    found.tensor_type.elem_type = dtype
    found.tensor_type.shape.dim.extend(
        onnx.TensorShapeProto.Dimension(dim_value=size) for size in shape
    )
    return found


_Results = list[tuple[Shape, int] | None]


def _described(known: Known, value: ir.Value | None) -> object:
    """All that inference looks at in an operand."""
    if value is None:
        return None
    array = known.values.get(value)
    return known.shapes[value], known.dtypes[value], None if array is None else array.tobytes()


def _result(found: onnx.TypeProto | None) -> tuple[Shape, int] | None:
    if found is None or not found.tensor_type.HasField("shape"):
        return None
    dims = [d.dim_value if d.HasField("dim_value") else -1 for d in found.tensor_type.shape.dim]
    return None if -1 in dims else (tuple(dims), found.tensor_type.elem_type)


def _without_schema(known: Known, node: ir.Node) -> _Results:
    """Operators of ONNX Runtime whose results have the shape of their first operand."""
    first = node.inputs[0] if node.inputs else None
    if first is None:
        return []
    if node.op_type == "FusedMatMul":
        return [_fused_product(known, node)]
    if node.op_type in _LIKE_FIRST:
        return [(known.shapes[first], known.dtypes[first])]
    return []


def _constant(node: ir.Node) -> ir.TensorProtocol | None:
    for name, attribute in node.attributes.items():
        if name == "value":
            return attribute.as_tensor()
        if name in ("value_int", "value_ints"):
            return ir.tensor(np.array(attribute.value, dtype=np.int64))
        if name in ("value_float", "value_floats"):
            return ir.tensor(np.array(attribute.value, dtype=np.float32))
    return None


def _sizes(known: Known, node: ir.Node) -> bool:
    """Shape and Size: the shape is enough."""
    if node.op_type not in ("Shape", "Size") or node.domain != "":
        return False
    shape = known.shapes.get(node.inputs[0]) if node.inputs[0] is not None else None
    if shape is None:
        return True
    if node.op_type == "Size":
        found = np.array(prod(shape), dtype=np.int64)
    else:
        start = node.attributes.get_int("start", 0)
        end = node.attributes.get_int("end", len(shape))
        found = np.array(shape[start:end], dtype=np.int64)
    _put(known, node.outputs[0], found)
    return True


def _cut_table(known: Known, node: ir.Node) -> bool:
    """Rows of a constant table, as many as there are tokens: more here than the table may have."""
    if node.op_type != "Slice" or len(node.inputs) < 4 or node.domain != "":
        return False
    table, *places = node.inputs[:4]
    found = [known.values.get(value) for value in places if value is not None]
    if table is None or table not in known.shapes or len(found) != 3:
        return False
    starts, ends, axes = found
    if starts is None or ends is None or axes is None:
        return False
    is_written = places[1] is None or places[1].const_value is not None
    if is_written or not starts.size == ends.size == axes.size or not _by_one(known, node):
        return False
    shape, grown = list(known.shapes[table]), False
    cuts = (each.reshape(-1).tolist() for each in (starts, ends, axes))
    for start, end, axis in zip(*cuts, strict=True):
        is_longer = start >= 0 and max(start, shape[axis]) < end < UNBOUNDED
        grown |= is_longer
        shape[axis] = end - start if is_longer else len(range(shape[axis])[start:end])
    if not grown:
        return False
    known.shapes[node.outputs[0]] = tuple(shape)
    known.dtypes[node.outputs[0]] = known.dtypes[table]
    return True


def _by_one(known: Known, node: ir.Node) -> bool:
    given = node.inputs[4] if len(node.inputs) > 4 else None
    steps = known.values.get(given) if given is not None else np.array(1)
    return steps is not None and bool((steps == 1).all())


def _put(known: Known, value: ir.Value, array: np.ndarray) -> None:
    known.values[value] = array
    known.shapes[value] = array.shape
    known.dtypes[value] = int(ir.DataType.from_numpy(array.dtype))


def _fused_product(known: Known, node: ir.Node) -> tuple[Shape, int] | None:
    """com.microsoft FusedMatMul: the last two axes of an operand exchanged where it says so."""
    first, second = node.inputs[:2]
    if first is None or second is None:
        return None
    shapes = []
    for value, name in ((first, "transA"), (second, "transB")):
        shape = known.shapes[value]
        if len(shape) < 2:
            return None
        turned = node.attributes.get_int(name, 0)
        shapes.append((*shape[:-2], shape[-1], shape[-2]) if turned else shape)
    try:
        batch = np.broadcast_shapes(shapes[0][:-2], shapes[1][:-2])
    except ValueError:
        return None
    return (*batch, shapes[0][-2], shapes[1][-1]), known.dtypes[first]
