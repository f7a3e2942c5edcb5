"""The bytes of each layout: what a runtime's operator makes of them is the weight."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from mla_deploy.weight_forms.form import WeightForm
from mla_deploy.weight_forms.parts import (
    HEADS,
    LAYOUTS,
    NBITS,
    QDQ,
    QDQ_HEADS,
    ROWS,
    Part,
    part_bytes,
    part_names,
)
from mla_deploy.weight_forms.rounding import dequantized, quantized

FORMS = [
    WeightForm(kind, block, symmetric)
    for kind in ("int4", "int8") for block in (32, 128) for symmetric in (True, False)
]  # fmt: skip
STORED = {"uint8": torch.uint8, "int8": torch.int8, "fp32": torch.float32, "int4": torch.uint8}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def made(weight: torch.Tensor, form: WeightForm, layout: str) -> dict[str, torch.Tensor]:
    return part_bytes(weight, Part("", form, layout))


def run(op_type: str, inputs: dict[str, Any], attributes: dict[str, Any], domain: str) -> Any:
    """One node on ONNX Runtime, its first input fed, the others initializers."""
    values = {n: ir.Value(name=n, const_value=ir.tensor(a, name=n)) for n, a in inputs.items()}
    first = next(iter(values.values()))
    first.const_value, array = None, next(iter(inputs.values()))
    first.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    first.shape = ir.Shape(array.shape)
    order = attributes.pop("order", list(inputs))
    node = ir.node(op_type, [values[n] for n in order], attributes=attributes, domain=domain)
    out = node.outputs[0]
    out.name, out.type = "out", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([first], [out], nodes=[node], initializers=[*values.values()][1:],
                     opset_imports={"": 21, "com.microsoft": 1}, name="one")  # fmt: skip
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {str(first.name): array})[0]


@pytest.mark.parametrize("columns", [256, 72])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.spelling)
def test_matmul_nbits_reads_the_weight(form: WeightForm, columns: int) -> None:
    """Unit vectors, which eight bits hold exactly, bring out the columns one by one."""
    weight = random(7, columns)
    parts = made(weight, form, NBITS)
    unit = np.eye(columns, dtype=np.float32)
    found = run(
        "MatMulNBits", {"x": unit, **{n: p.numpy() for n, p in parts.items()}},
        {"K": columns, "N": 7, "bits": form.bits, "block_size": form.block, "accuracy_level": 4},
        "com.microsoft",
    )  # fmt: skip
    wanted = dequantized(quantized(weight, form), form).numpy().T
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.spelling)
def test_gather_reads_the_same_bytes_as_rows(form: WeightForm) -> None:
    weight = random(9, 256)
    parts = made(weight, form, NBITS)
    rows = made(weight, form, ROWS)
    assert all(torch.equal(parts[name].flatten(), rows[name].flatten()) for name in parts)
    values = parts["values"].reshape(Part("values", form, ROWS).shape((9, 256)))
    ids = np.array([3, 0, 8], np.int64)
    zeros = {"zeros": parts["zero_points"].numpy()} if "zero_points" in parts else {}
    found = run(
        "GatherBlockQuantized",
        {"ids": ids, "values": values.numpy(), "scales": parts["scales"].numpy(), **zeros},
        {"bits": form.bits, "block_size": form.block, "gather_axis": 0, "quantize_axis": 1,
         "order": ["values", "ids", "scales", *zeros]},
        "com.microsoft",
    )  # fmt: skip
    wanted = dequantized(quantized(weight, form), form).numpy()[ids]
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", FORMS[:1] + FORMS[4:5], ids=lambda form: form.spelling)
def test_heads_are_the_matrices_of_the_heads(form: WeightForm) -> None:
    w_HIO = random(3, 64, 40)
    parts = made(w_HIO, form, HEADS)
    own = made(w_HIO[1].T.contiguous(), form, NBITS)
    for name, part in parts.items():
        assert torch.equal(part.view(3, 40, *part.shape[1:])[1], own[name])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.spelling)
def test_shapes_and_dtypes_are_those_of_the_bytes(form: WeightForm, layout: str) -> None:
    """What the graph is told before a byte is made."""
    is_qdq = layout in (QDQ, QDQ_HEADS)
    if is_qdq and not form.symmetric:
        form = WeightForm(form.kind, form.block)  # TensorRT takes no zero points
    shape = (2, 128, 64) if layout in (HEADS, QDQ_HEADS) else (6, 128)
    parts = made(random(*shape), form, layout)
    assert tuple(parts) == part_names(form)
    for name, found in parts.items():
        part = Part(name, form, layout)
        assert found.dtype == STORED[part.dtype]
        packed = 2 if part.dtype == "int4" else 1
        assert prod(part.shape(shape)) == found.numel() * packed
        if part.dtype != "int4" and layout != ROWS:
            assert tuple(found.shape) == part.shape(shape)


@pytest.mark.parametrize("layout", [QDQ, QDQ_HEADS])
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
def test_dequantize_linear_reads_the_weight(kind: str, layout: str) -> None:
    form = WeightForm(kind, 32)
    weight = random(3, 64, 40) if layout == QDQ_HEADS else random(6, 128)
    parts = made(weight, form, layout)
    dtype = {"int4": ir.DataType.INT4, "int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}
    values = ir.Value(name="values", const_value=ir.PackedTensor(
        parts["values"].numpy(), dtype[kind], shape=ir.Shape(weight.shape), name="values",
    ) if kind == "int4" else ir.Tensor(
        parts["values"].view(torch.uint8).numpy().view(dtype[kind].numpy()), dtype=dtype[kind],
        name="values",
    ))  # fmt: skip
    scales = ir.Value(name="scales", type=ir.TensorType(ir.DataType.FLOAT),
                      shape=ir.Shape(parts["scales"].shape))  # fmt: skip
    node = ir.node("DequantizeLinear", [values, scales],
                   attributes={"axis": 1, "block_size": form.block})  # fmt: skip
    out = node.outputs[0]
    out.name, out.type = "out", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([scales], [out], nodes=[node], initializers=[values],
                     opset_imports={"": 23}, name="one")  # fmt: skip
    model = ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    found = session.run(None, {"scales": parts["scales"].numpy()})[0]
    back = weight.transpose(1, 2) if layout == QDQ_HEADS else weight
    wanted = dequantized(quantized(back, form), form)
    wanted = wanted.transpose(1, 2) if layout == QDQ_HEADS else wanted
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-6, atol=1e-7)
