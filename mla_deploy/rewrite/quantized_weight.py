"""The composite that stands for a quantised weight until its bytes have a place in a file.

    QuantizeWeight(weight; form, layout) -> values, scales [, zero points]

Each output becomes an input of the graph, `<weight>.values` and so on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

from mla_deploy.errors import MlaDeployError
from mla_deploy.rewrite.rule import DOMAIN, required, static
from mla_deploy.weight_forms.form import WeightForm
from mla_deploy.weight_forms.parts import Part, part_names

OPERATOR = "QuantizeWeight"
DTYPES = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
    "uint8": ir.DataType.UINT8,
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
    "fp8": ir.DataType.FLOAT8E4M3FN,
}


def parts_of(
    op: Any, weight: ir.Value, form: WeightForm, layout: str, scale_dtype: str = "fp32"
) -> list[ir.Value]:
    """The outputs of a new QuantizeWeight, typed."""
    names = part_names(form)
    values = op.QuantizeWeight(
        weight,
        kind=form.kind,
        block=form.block,
        symmetric=int(form.symmetric),
        layout=layout,
        scale_dtype=scale_dtype,
        _domain=DOMAIN,
        _outputs=len(names),
    )
    shape = tuple(static(weight, axis) for axis in range(len(required(weight).shape or ())))
    _set_types(list(values), shape, [Part(name, form, layout, scale_dtype) for name in names])
    return list(values)


def _set_types(values: list[ir.Value], shape: tuple[int, ...], parts: list[Part]) -> None:
    for part, value in zip(parts, values, strict=True):
        value.type = ir.TensorType(DTYPES[part.dtype])
        value.shape = ir.Shape(part.shape(shape))


def lifted_parts(graph: ir.Graph) -> Iterator[tuple[ir.Value, ir.Value, Part]]:
    """(weight, new free value in place of the part, part) of each composite, in subgraphs too.

    The composites are taken away. A weight that is quantised twice in one way gives the same names.
    """
    made: dict[str, ir.Value] = {}
    for node in list(ir.traversal.RecursiveGraphIterator(graph)):
        if node.op_type != OPERATOR or node.domain != DOMAIN:
            continue
        weight = required(node.inputs[0])
        given: dict[str, Any] = {name: a.value for name, a in node.attributes.items()}
        form = WeightForm(given["kind"], given["block"], bool(given["symmetric"]))
        for name, output in zip(part_names(form), node.outputs, strict=True):
            part = Part(name, form, given["layout"], given["scale_dtype"])
            own = f"{weight.name}.{name}"
            lifted = made.setdefault(own, ir.Value(name=own, shape=output.shape, type=output.type))
            if lifted.shape != output.shape:
                raise MlaDeployError("EXP-WEIGHT", f"{own} is asked for in two forms")
            output.replace_all_uses_with(lifted)
            yield weight, lifted, part
        owner = node.graph
        if owner is None:
            raise MlaDeployError("EXP-WEIGHT", f"{weight.name} is quantised outside of any graph")
        owner.remove(node, safe=True)
