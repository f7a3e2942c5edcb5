"""Where an initializer of a graph lies in the weight file, and in what shape it is seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from mla_deploy.errors import MlaDeployError
from mla_deploy.export.weights import StoredWeight, WeightLayout
from mla_deploy.rewrite.quantized_weight import DTYPES as IR_DTYPES
from mla_deploy.rewrite.weights import WeightUse
from mla_deploy.weight_forms.parts import ROWS

ROWS_VIEW = ".rows"  # the bytes of the weight before this, read as rows of an embedding


def bind_weights(model: ir.Model, layout: WeightLayout, folder: Path, file: str) -> None:
    """Point every weight initializer at its bytes in the weight file."""
    ranges = layout.ranges()
    for name, value in model.graph.initializers.items():
        held = name.removesuffix(ROWS_VIEW)
        if held in ranges and held in layout.weights:
            offset, length = ranges[held]
            stored = layout.weights[held]
            value.type = ir.TensorType(IR_DTYPES[stored.dtype])
            value.const_value = ir.ExternalTensor(
                file,
                offset,
                length,
                IR_DTYPES[stored.dtype],
                shape=value.shape if name != held and value.shape else ir.Shape(stored.shape),
                name=name,
                base_dir=folder,
            )


def stored_part(name: str, use: WeightUse, shape: tuple[int, ...]) -> tuple[StoredWeight, bool]:
    """A part of a quantised weight, and whether the graph sees its bytes in another shape."""
    part = use.part
    if part is None:
        raise MlaDeployError("EXP-WEIGHT", f"{name} is no part of a quantised weight")
    is_view = part.layout == ROWS and part.name == "values"
    if is_view:
        blob = part.form.block * part.form.bits // 8
        shape = (shape[0], shape[1] // blob, blob)
    return StoredWeight(name, replace(use, part=part.stored), shape, part.dtype), is_view
