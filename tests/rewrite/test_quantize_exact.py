"""Integer products of ONNX Runtime in the worst case: exact, on whatever processor this runs.

On AVX2 without VNNI, ONNX Runtime multiplies uint8 by int8 with an instruction that adds two
products in 16 bits and saturates: 255 * 127 + 255 * 127 does not fit. `MatMulInteger` was seen to
give half of the right sum there (ONNX Runtime 1.31.1 under QEMU's `-cpu Haswell`). `MatMulNBits`,
which is what quantised weights use, was seen to be exact there in all of these cases.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

K, N = 256, 8
LARGEST = 127.0  # what a block of activations is rounded to: exact, so the product must be


def product(x: Any, bits: int, block: int, value: int, zero: int | None) -> Any:
    """x times a weight whose every value is `value`, scales 1."""
    blocks = K // block
    values = np.full((N, K), value, np.uint8)
    zeros = np.full((N, blocks), zero or 0, np.uint8)
    if bits == 4:
        values = values[:, ::2] | (values[:, 1::2] << 4)
        zeros = zeros[:, ::2] | (zeros[:, 1::2] << 4)
    parts = {"values": values.reshape(N, blocks, -1), "scales": np.ones((N, blocks), np.float32)}
    if zero is not None:
        parts["zeros"] = zeros
    given = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(x.shape))
    held = [ir.Value(name=n, const_value=ir.tensor(a, name=n)) for n, a in parts.items()]
    numbers = {"K": K, "N": N, "bits": bits, "block_size": block, "accuracy_level": 4}
    node = ir.node("MatMulNBits", [given, *held], attributes=numbers, domain="com.microsoft")
    out = node.outputs[0]
    out.name, out.type = "out", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([given], [out], nodes=[node], initializers=held,
                     opset_imports={"": 21, "com.microsoft": 1}, name="worst")  # fmt: skip
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_no_pair_of_extremes_saturates(bits: int, block: int, rows: int) -> None:
    most = 2**bits - 1
    for sign in (1.0, -1.0):
        x = np.full((rows, K), sign * LARGEST, np.float32)
        for value in (0, most):
            for zero in (None, 0, most):
                middle = 2 ** (bits - 1) if zero is None else zero
                wanted = (value - middle) * sign * LARGEST * K
                found = product(x, bits, block, value, zero)
                # Sums of at most 2^23 are exact in fp32; scales and their sums round once or twice.
                assert np.abs(found - wanted).max() <= 1e-6 * LARGEST * K * most
