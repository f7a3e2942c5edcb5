"""Graphs that read weights in the dtype they have on disk, and compute in fp32.

    # before:  layer.3(hidden, ..., weight)           the function expects what assembly stored
    # after:   layer.3(hidden, ..., weight as on disk)
    #          in the function:  Cast(weight) -> each node that reads it, in that node's own branch

In the branch, so that an expert that is not hit is not converted either.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from mla_deploy.export.assemble import IR_DTYPES
from mla_deploy.export.in_place import OnDisk

_FLOAT = ir.DataType.FLOAT


def point_in_place(model: ir.Model, kept: Mapping[str, OnDisk], folder: Path) -> None:
    """Point initializers of `model` at the checkpoint's bytes, and widen what is not fp32."""
    formals: dict[ir.Value, None] = {}
    for name, value in model.graph.initializers.items():
        if name not in kept:
            continue
        _point(value, kept[name], folder)
        if value.dtype == _FLOAT:
            continue
        for node, index in list(value.uses()):
            function = model.functions.get(node.op_identifier())
            if function is None:
                _widen(value, node, index)
            else:
                formals[function.inputs[index]] = None
    for formal in formals:
        formal.type = formal.shape = None  # layers of one kind may differ
        for node, index in list(formal.uses()):
            _widen(formal, node, index)


def _point(value: ir.Value, place: OnDisk, folder: Path) -> None:
    dtype = IR_DTYPES[place.dtype]
    value.const_value = ir.ExternalTensor(
        place.file,
        place.offset,
        place.nbytes,
        dtype,
        shape=ir.Shape(place.shape),
        name=str(value.name),
        base_dir=folder,
    )
    value.type = ir.TensorType(dtype)


def _widen(weight: ir.Value, node: ir.Node, index: int) -> None:
    """Let `node` read `weight` in fp32; a cast that is there already moves to what reads it."""
    if node.op_type == "Gather" and _all_cast(node.outputs[0]):
        return  # an embedding: only the rows taken are cast
    if node.op_type != "Cast":
        cast = ir.node("Cast", [weight], attributes={"to": _FLOAT})
        cast.outputs[0].name = f"{node.outputs[0].name}.fp32.{index}"
        node.replace_input_with(index, cast.outputs[0])
        node.prepend(cast)
        return
    for reader, place in list(node.outputs[0].uses()):
        reader.replace_input_with(place, weight)
        _widen(weight, reader, place)
    if node.graph is not None and not node.outputs[0].is_graph_output():
        node.graph.remove(node, safe=True)


def _all_cast(value: ir.Value) -> bool:
    return all(user.op_type == "Cast" for user, _ in value.uses())
