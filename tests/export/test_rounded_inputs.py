"""What inputs are rounded to where calibrating judges: what ONNX Runtime's own product rounds."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from mla_deploy.export.calibration.rounded_inputs import rounded_inputs
from mla_deploy.weight_forms.form import WeightForm
from mla_deploy.weight_forms.parts import NBITS, Part, packed
from mla_deploy.weight_forms.rounding import Quantized, dequantized, quantized

ROWS, COLUMNS = 5, 48


def runtime_product(x_XK: torch.Tensor, stored: Quantized, form: WeightForm) -> torch.Tensor:
    """`x_XK` times the weight, as the graphs of a CPU multiply."""
    columns = x_XK.shape[1]
    parts = packed(stored, Part("values", form, NBITS))
    blocks = form.blocks(columns)
    arrays = {
        "values": parts["values"].numpy().reshape(COLUMNS, blocks, -1),
        "scales": parts["scales"].numpy().reshape(COLUMNS, blocks),
    }
    given = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(x_XK.shape))
    held = [ir.Value(name=n, const_value=ir.tensor(a, name=n)) for n, a in arrays.items()]
    numbers = {"K": columns, "N": COLUMNS, "bits": form.bits, "block_size": form.block,
               "accuracy_level": 4}  # fmt: skip
    node = ir.node("MatMulNBits", [given, *held], attributes=numbers, domain="com.microsoft")
    node.outputs[0].name, node.outputs[0].type = "out", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([given], node.outputs, nodes=[node], initializers=held,
                     opset_imports={"": 21, "com.microsoft": 1}, name="product")  # fmt: skip
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return torch.from_numpy(np.asarray(session.run(None, {"x": x_XK.numpy()})[0]))


@pytest.mark.parametrize("columns", [128, 80], ids=["whole blocks", "a short last block"])
@pytest.mark.parametrize(
    "form", [WeightForm("int8", 64), WeightForm("int8", 32), WeightForm("int4", 32)], ids=str
)
def test_inputs_are_rounded_as_the_runtime_does(form: WeightForm, columns: int) -> None:
    generator = torch.Generator().manual_seed(7)
    x_XK = torch.randn(ROWS, columns, generator=generator)
    x_XK[:, 3] *= 40.0  # what a large channel does to its block
    stored = quantized(torch.randn(COLUMNS, columns, generator=generator), form)
    weight = dequantized(stored, form)
    found = runtime_product(x_XK, stored, form)
    wanted = rounded_inputs(x_XK, form) @ weight.T
    plain = x_XK @ weight.T
    # A tie may round the other way in one of the two.
    assert (found - wanted).norm() < 0.1 * (found - plain).norm()
    assert (found - plain).norm() > 1e-3 * plain.norm()


def test_a_row_of_zeros_stays_one() -> None:
    assert torch.equal(
        rounded_inputs(torch.zeros(2, 64), WeightForm("int8", 64)), torch.zeros(2, 64)
    )
