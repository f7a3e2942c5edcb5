"""Graphs that read weights in the form they have on disk, and compute in fp32.

    # before:  layer.3(hidden, ..., weight)           the function expects what assembly stored
    # after:   layer.3(hidden, ..., weight, ..., scale)      as on disk
    #          in the function:  Cast(weight), or DequantizeLinear(weight, rows of the scale),
    #          before each node that reads it, in that node's own branch

In the branch, so that an expert that is not hit is not converted either.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from mla_deploy.export.in_place import OnDisk
from mla_deploy.export.scales import dequantized, scale_function

_FLOAT = ir.DataType.FLOAT
_DTYPES = {
    "F32": _FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
    "I8": ir.DataType.INT8,
}


def point_in_place(model: ir.Model, kept: Mapping[str, OnDisk], folder: Path) -> None:
    """Point initializers of `model` at the checkpoint's bytes, and widen what is not fp32."""
    pointing = _Pointing(model, folder)
    for name, value in list(model.graph.initializers.items()):
        if name in kept:
            pointing.point(value, kept[name])
    pointing.functions()


class _Pointing:
    def __init__(self, model: ir.Model, folder: Path) -> None:
        self.model = model
        self.folder = folder
        self.formals: dict[ir.Value, OnDisk] = {}  # parameter of a function -> one of its values
        self.scales: dict[ir.Value, ir.Value] = {}  # by initializer

    def point(self, value: ir.Value, place: OnDisk) -> None:
        """Point an initializer at its bytes; what reads it outside of functions is seen to."""
        self._point(value, place)
        scale = None
        if place.scale is not None:
            scale = ir.Value(name=f"{value.name}.scale", shape=ir.Shape(place.scale.shape))
            self._point(scale, place.scale)
            self.model.graph.register_initializer(scale)
            self.scales[value] = scale
        if value.dtype == _FLOAT:
            return
        for node, index in list(value.uses()):
            function = self.model.functions.get(node.op_identifier())
            if function is not None:
                self.formals[function.inputs[index]] = place
            else:
                self._widen((value, scale, place), node, index)

    def functions(self) -> None:
        """See to the functions that take such initializers, and give their calls the scales."""
        added: dict[ir.OperatorIdentifier, list[int]] = {}
        for key, function in list(self.model.functions.items()):
            added[key] = []
            for index, formal in enumerate(list(function.inputs)):
                if formal not in self.formals:
                    continue
                formal.type = formal.shape = None  # layers of one kind may differ
                scale, place = None, self.formals[formal]
                if place.scale is not None:
                    scale = ir.Value(name=f"{formal.name}.scale")
                    function.inputs.append(scale)
                    added[key].append(index)
                for node, at in list(formal.uses()):
                    self._widen((formal, scale, place), node, at)
        for node in self.model.graph:
            if added.get(node.op_identifier()):
                _append_inputs(node, [self._scale(node, i) for i in added[node.op_identifier()]])

    def _point(self, value: ir.Value, place: OnDisk) -> None:
        dtype = _DTYPES[place.dtype]
        value.const_value = ir.ExternalTensor(
            place.file,
            place.offset,
            place.nbytes,
            dtype,
            shape=ir.Shape(place.shape),
            name=str(value.name),
            base_dir=self.folder,
        )
        value.type = ir.TensorType(dtype)

    def _scale(self, node: ir.Node, index: int) -> ir.Value:
        value = node.inputs[index]
        if value is None or value not in self.scales:
            raise ValueError(f"{node.name} has no scale for its input {index}")
        return self.scales[value]

    def _widen(
        self, weight: tuple[ir.Value, ir.Value | None, OnDisk], node: ir.Node, index: int
    ) -> None:
        """Let `node` read a weight in fp32; a cast that is there already moves to what reads it."""
        value, scale, place = weight
        if node.op_type == "Gather" and _all_cast(node.outputs[0]) and scale is None:
            return  # an embedding: only the rows taken are cast
        if node.op_type != "Cast":
            nodes = self._wide(value, scale, place)
            for number, wide in enumerate(nodes):
                wide.outputs[0].name = f"{node.outputs[0].name}.fp32.{index}.{number}"
            node.replace_input_with(index, nodes[-1].outputs[0])
            node.prepend(nodes)
            return
        for reader, at in list(node.outputs[0].uses()):
            reader.replace_input_with(at, value)
            self._widen(weight, reader, at)
        if node.graph is not None:
            node.graph.remove(node, safe=True)

    def _wide(self, value: ir.Value, scale: ir.Value | None, place: OnDisk) -> tuple[ir.Node, ...]:
        if scale is None or place.blocks is None:
            return (ir.node("Cast", [value], attributes={"to": _FLOAT}),)
        function = scale_function(place.blocks, place.shape[0])
        self.model.functions.setdefault(function.identifier(), function)
        return dequantized(value, scale, place.blocks, function)


def _append_inputs(node: ir.Node, values: list[ir.Value]) -> None:
    before = len(node.inputs)
    node.resize_inputs(before + len(values))
    for index, value in enumerate(values, before):
        node.replace_input_with(index, value)


def _all_cast(value: ir.Value) -> bool:
    return all(user.op_type == "Cast" for user, _ in value.uses())
