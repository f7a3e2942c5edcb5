"""The same graph under another face: what tools do to graphs between exporter and us."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper, version_converter

from tests.foreign.graph import ForeignGraph

_LEAST = 64  # elements of a weight


def disguised(graph: ForeignGraph, name: str, folder: Path) -> ForeignGraph:
    """`graph` with the edit `name` of `DISGUISES`, in `folder`."""
    model = onnx.load(str(graph.path))
    path = folder / f"{graph.path.stem}-{name}.onnx"
    DISGUISES[name](model, path)
    return replace(graph, path=path)


def _saved(edit: Callable[[onnx.ModelProto], onnx.ModelProto]) -> Callable[..., None]:
    def write(model: onnx.ModelProto, path: Path) -> None:
        onnx.save(edit(model), str(path))

    return write


def _shuffled(model: onnx.ModelProto) -> onnx.ModelProto:
    """Another order that is still an order."""
    draw = np.random.default_rng(5)
    made = {value.name for value in model.graph.input}
    made |= {tensor.name for tensor in model.graph.initializer} | {""}
    waiting, order = list(model.graph.node), []
    while waiting:
        ready = [node for node in waiting if set(node.input) <= made]
        node = ready[int(draw.integers(len(ready)))]
        waiting.remove(node)
        order.append(node)
        made |= set(node.output)
    del model.graph.node[:]
    model.graph.node.extend(order)
    return model


def _nameless(model: onnx.ModelProto) -> onnx.ModelProto:
    """Nodes without names, values with numbers, no types in between."""
    kept = {value.name for value in (*model.graph.input, *model.graph.output)} | {""}
    names: dict[str, str] = {}
    for node in model.graph.node:
        node.name = ""
        for values in (node.input, node.output):
            values[:] = [
                name if name in kept else names.setdefault(name, str(len(names))) for name in values
            ]
    for tensor in model.graph.initializer:
        tensor.name = names.setdefault(tensor.name, str(len(names)))
    del model.graph.value_info[:]
    return model


def _weights(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    return [
        tensor
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and np.prod(tensor.dims) >= _LEAST
    ]


def _stored_as_halves(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights in fp16, cast where they are read."""
    for tensor in _weights(model):
        name = tensor.name
        half = numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
        cast = helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT)
        model.graph.node.insert(0, cast)
    return model


def _quantized(model: onnx.ModelProto) -> onnx.ModelProto:
    """Matrices in int8 behind DequantizeLinear, a scale for each column."""
    for tensor in _weights(model):
        matrix = numpy_helper.to_array(tensor)
        if matrix.ndim != 2:
            continue
        name, scale = tensor.name, np.abs(matrix).max(axis=0) / 127
        codes = np.round(matrix / np.maximum(scale, 1e-9)).astype(np.int8)
        tensor.CopyFrom(numpy_helper.from_array(codes, f"{name}.codes"))
        model.graph.initializer.append(
            numpy_helper.from_array(scale.astype(np.float32), f"{name}.scale")
        )
        inputs = [f"{name}.codes", f"{name}.scale"]
        model.graph.node.insert(0, helper.make_node("DequantizeLinear", inputs, [name], axis=1))
    return model


def _with_identities(model: onnx.ModelProto) -> onnx.ModelProto:
    """An Identity behind every node."""
    outputs = {value.name for value in model.graph.output}
    nodes = []
    for place, node in enumerate(model.graph.node):
        nodes.append(node)
        for index, name in enumerate(node.output):
            if name and name not in outputs:
                node.output[index] = f"{name}.{place}.raw"
                nodes.append(helper.make_node("Identity", [node.output[index]], [name]))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]
    return model


def _as_sequences(model: onnx.ModelProto) -> onnx.ModelProto:
    """Parts are cut into a sequence, as torch writes them without optimisation; halves by size."""
    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    shapes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.value_info}
    nodes = []
    for node in model.graph.node:
        if node.op_type != "Split" or len(node.input) < 2 or node.input[1] not in known:
            nodes.append(node)
            continue
        sizes, (axis,) = known[node.input[1]], [a.i for a in node.attribute if a.name == "axis"]
        by_size = len(set(sizes.tolist())) == 1 and node.input[0] in shapes
        name = f"{node.output[0]}.parts"
        given = sizes[0] if by_size else sizes
        model.graph.initializer.append(numpy_helper.from_array(np.array(given), f"{name}.sizes"))
        cut = [node.input[0], f"{name}.sizes"]
        nodes.append(helper.make_node("SplitToSequence", cut, [name], axis=axis))
        for place, part in enumerate(node.output):
            index = np.array(place - len(sizes) if place else 0)
            model.graph.initializer.append(numpy_helper.from_array(index, f"{part}.place"))
            nodes.append(helper.make_node("SequenceAt", [name, f"{part}.place"], [part]))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _external(model: onnx.ModelProto, path: Path) -> None:
    onnx.save(model, str(path), save_as_external_data=True, size_threshold=1024,
              location=f"{path.name}.data")  # fmt: skip


def _external_each(model: onnx.ModelProto, path: Path) -> None:
    onnx.save(model, str(path), save_as_external_data=True, size_threshold=1024,
              all_tensors_to_one_file=False)  # fmt: skip


def _at_opset(version: int) -> Callable[..., None]:
    return _saved(lambda model: version_converter.convert_version(model, version))


DISGUISES: dict[str, Callable[[onnx.ModelProto, Path], None]] = {
    "shuffled": _saved(_shuffled),
    "nameless": _saved(_nameless),
    "halves": _saved(_stored_as_halves),
    "quantized": _saved(_quantized),
    "identities": _saved(_with_identities),
    "sequences": _saved(_as_sequences),
    "external": _external,
    "external-each": _external_each,
    "opset-21": _at_opset(21),
    "opset-23": _at_opset(23),
}
